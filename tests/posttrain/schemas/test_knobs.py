"""Every option reaches the code that it is for.

Two halves. For every field of every schema, `knobs.txt` freezes the functions that read it from a configuration: an
option that is cut, or replaced by a constant, loses its place, and the test fails even where a field of that name is
read elsewhere. After a change that is meant, `python tests/posttrain/schemas/test_knobs.py` writes the list anew.
For the options of `filter`, a run shows that the value changes what is kept. (Those that only a training run reads are
held by the first half and by the tests of their rooms; the safety model's by tests/posttrain/filters/test_safety.py.)
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import row

from gemma2.posttrain import schemas
from gemma2.posttrain.filters.runner import run_filter
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import FilterConfig
from gemma2.posttrain.schemas.config import Config

ROOT = Path(__file__).resolve().parents[3]
FROZEN = Path(__file__).with_name("knobs.txt")
# Names under which code holds a configuration, or a part of one.
HOLDERS = {
    "config",
    "rl",
    "given",
    "fields",
    "limits",
    "settings",
    "rollout",
    "self",
    "file",
    "stage",
    "stages",
    "draft",
}


def all_fields() -> set[str]:
    found = {getattr(schemas, name) for name in schemas.__all__}
    classes = [value for value in found if isinstance(value, type) and issubclass(value, Config)]
    return {field for schema in classes for field in schema.model_fields}


def reads(path: Path, fields: set[str]) -> Iterator[tuple[str, str]]:
    """(field, module:function) for each `CONFIG.field`, and for names of fields that a tuple lists for getattr."""
    module = str(path.relative_to(ROOT)).removesuffix(".py")

    def visit(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{where}.{child.name}" if where else child.name
            if isinstance(child, ast.Attribute) and child.attr in fields and holder(child.value) in HOLDERS:
                yield child.attr, f"{module}:{where or '-'}"
            if isinstance(child, ast.Constant) and child.value in fields and isinstance(node, ast.Tuple):
                yield child.value, f"{module}:{where or '-'}"
            yield from visit(child, inner)

    return visit(ast.parse(path.read_text(encoding="utf-8")), "")


def holder(node: ast.AST) -> str:
    """The last name of an expression: `config` of `self.run.config`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def places() -> list[str]:
    fields = all_fields()
    files = [path for path in sorted((ROOT / "posttrain").rglob("*.py"))]
    return sorted({f"{field} {place}" for path in files for field, place in reads(path, fields)})


def test_every_option_is_read_where_it_was():
    frozen, found = FROZEN.read_text(encoding="utf-8").splitlines(), places()
    lost = [line for line in frozen if line not in found]
    new = [line for line in found if line not in frozen]
    assert (lost, new) == ([], []), "if this is meant: python tests/posttrain/schemas/test_knobs.py"


@pytest.mark.parametrize("field", sorted(all_fields()))
def test_every_option_has_a_place(field):
    from gemma2.merging.methods.option import OPTIONS

    common = {"base", "granularity", "tokenizer", "dtype", "slices", "method", "models"}
    if field in OPTIONS or field in common:
        return  # of a merge: tests/posttrain/schemas/test_merge.py shows that all of them arrive in the request
    assert any(line.split()[0] == field for line in places_once()), field


def places_once(found: list[list[str]] = []) -> list[str]:  # noqa: B006 - a cache
    if not found:
        found.append(places())
    return found[0]


# --- the filter ---


def prose(seed: int, words: int = 30) -> str:
    """A text that shares no three words in a row with that of another seed."""
    return " ".join(f"s{seed}w{i}" for i in range(words)) + "."


REFUSAL = "I'm sorry, but I can't help with that."
# Option -> (its value, what else is set in both runs, the rows).
FILTER = {
    "filters": (("empty",), {}, [row(prose(0)), row(prose(0))]),
    "skip": (("duplicate", "near-duplicate"), {}, [row(prose(0)), row(prose(0))]),
    "keep": (("hedging",), {"min_words": 20}, [row("I'm not sure about that."), row(prose(0), "b?")]),
    "keep_patterns": ({"mine": "s0w1"}, {"min_words": 50}, [row(prose(0)), row(prose(1, 60), "b?")]),
    "require_ending": (True, {}, [row(prose(0)), row(prose(1).rstrip("."), "b?")]),
    "min_words": (20, {}, [row(prose(0)), row("Yes, that is so.", "b?")]),
    "max_words": (20, {}, [row(prose(0)), row("Yes, that is so.", "b?")]),
    "min_chars": (50, {}, [row(prose(0)), row("Yes, that is so.", "b?")]),
    "max_chars": (50, {}, [row(prose(0)), row("Yes, that is so.", "b?")]),
    "max_repetition": (1.0, {}, [row(prose(0)), row("one two three four five " * 12, "b?")]),
    "language": (("de",), {}, [row("Der Hund schläft im Garten, und die Katze schaut ihm dabei zu."),
                               row("The dog sleeps in the garden while the cat looks at it.", "b?")]),
    "phone_region": ("DE", {}, [row("Rufen Sie an: 030 23125000."), row(prose(1), "b?")]),
    "identity": (("Claude",), {}, [row("I am Claude, a language model."), row(prose(1), "b?")]),
    "drop_disclaimers": (True, {}, [row("As an AI language model, I have no opinion on tea."), row(prose(1), "b?")]),
    "unsafe_categories": (("violence",), {}, [row("That is a fucking stupid idea."), row(prose(1), "b?")]),
    "unsafe_terms": (9, {}, [row("That is a fucking stupid idea."), row(prose(1), "b?")]),
    "decontaminate_ngram": (5, {"decontaminate": ("eval.jsonl",)}, [row("s9w1 s9w2 s9w3 s9w4 s9w5 s9w6 and more text."),
                                                                    row(prose(1), "b?")]),
    "dedup_on": ("prompt", {}, [row(prose(0)), row(prose(1))]),
    "near_threshold": (0.3, {}, [row(prose(0, 30)), row(prose(0, 30)[:-1] + " " + prose(1, 20), "a?")]),
    "shingle_words": (1, {}, [row("a b c d e f g h i j k l m n o p q r s t u v."),
                              row("a c b e d g f i h k j m l o n q p s r u t v.")]),
    "max_refusal_share": (0.01, {}, [row(REFUSAL), row(prose(0), "b?")]),
    "all_reasons": (True, {"max_words": 3, "max_chars": 3}, [row("I am ChatGPT, by OpenAI."), row("Yes.", "b?")]),
    "shard_rows": (1, {}, [row(prose(0)), row(prose(1), "b?")]),
    "seed": (1, {"max_refusal_share": 0.5}, [row(f"{REFUSAL} {i}", f"{i}?") for i in range(9)] + [row(prose(0), "x?")]),
}  # fmt: skip


@pytest.mark.parametrize("option", FILTER)
def test_an_option_of_the_filter_changes_what_is_written(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, common, rows = FILTER[option]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": prose(9)}) + "\n", encoding="utf-8")

    def written(name, **settings):
        config = FilterConfig(data="data.jsonl", workers=1, **common, **settings)
        out = run_filter(config, RunOptions(tmp_path / name)).out
        return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".jsonl"}

    assert written("given", **{option: value}) != written("default")


if __name__ == "__main__":
    FROZEN.write_text("\n".join(places()) + "\n", encoding="utf-8")
