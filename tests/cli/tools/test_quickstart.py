"""`gemma2 quickstart` beside an earlier one."""

import pytest

from gemma2.cli.app import invoke
from gemma2.configs import recipes
from gemma2.core.errors import OutputError
from gemma2.posttrain.pipelines.compile import compile_pipeline, read_pipeline
from gemma2.posttrain.pipelines.run import _write_file


def test_a_quickstart_of_other_settings_is_not_replaced(tmp_path):
    root = tmp_path / "quickstart"
    root.mkdir()
    _write_file(compile_pipeline(read_pipeline(recipes()["quickstart"]), root))
    before = (root / "pipeline.yaml").read_bytes()
    with pytest.raises(OutputError, match=r"other settings \(seed 0 -> 1\); choose another --out, such as .*-2"):
        invoke(["quickstart", "--seed", "1", "--out", str(root)])
    with pytest.raises(OutputError, match=r"other settings \(stages\)"):
        invoke(["quickstart", "--set", "warp.policies=3", "--out", str(root)])
    assert [path.name for path in root.iterdir()] == ["pipeline.yaml"]
    assert (root / "pipeline.yaml").read_bytes() == before
