"""`Any` stays rare: every use hides a mistake from the type checker."""

import ast
import tomllib

from processes import ROOT

LAYERS = ("core", "merging", "posttrain", "cli", "configs")
MOST = 120


def test_any_is_rare():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    uses = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "Any"]
    assert len(uses) < MOST


def test_the_strict_rules_hold_for_every_package():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert mypy["strict"]
    ours = [entry for entry in mypy["overrides"] if any(name.startswith("gemma2") for name in entry["module"])]
    assert ours == []
