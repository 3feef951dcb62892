"""Two fronts of one WARP run, the second with the points of the first; read by several test files, changed by none."""

import pytest
from policies import pareto_config, two_iterations

from gemma2.posttrain.evaluation.pareto import run_pareto
from gemma2.posttrain.runs.run_directory import RunOptions


@pytest.fixture(scope="session")
def iterations(tmp_path_factory):
    """The folder of the run: base, sft, iteration-1, iteration-2, each iteration with its front."""
    root = two_iterations(tmp_path_factory.mktemp("run"))
    first = root / "iteration-1" / "front"
    run_pareto(pareto_config(root, 1), RunOptions(first))
    run_pareto(pareto_config(root, 2, fronts=(first,)), RunOptions(root / "iteration-2" / "front"))
    return root
