"""Two fronts of one WARP run, the second with the points of the first; read by several test files, changed by none."""

import pytest
from policies import pareto_config, two_iterations

from gemma2.posttrain.evaluation.compared import figure
from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.reports.plots import figures
from gemma2.posttrain.runs.run_directory import RunOptions


@pytest.fixture(scope="session")
def iterations(tmp_path_factory):
    """The folder of the run: base, sft, iteration-1, iteration-2, each iteration with its front."""
    root = two_iterations(tmp_path_factory.mktemp("run"))
    first = root / "iteration-1" / "front"
    run_pareto(pareto_config(root, 1), RunOptions(first))
    run_pareto(pareto_config(root, 2, fronts=(first,)), RunOptions(root / "iteration-2" / "front"))
    return root


@pytest.fixture(scope="module", autouse=True)
def _figures_are_left_out(request):
    """A figure takes as long as half of a tiny front; modules that look at figures say so with `DRAWN = True`."""
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWN", False):
            patch.setattr(figures, "front_figure", lambda points: None)
            patch.setattr(figure, "results_figure", lambda *_: None)
            patch.setattr(figures, "write_figure", lambda figure, path: path.write_text("not drawn\n"))
        yield
