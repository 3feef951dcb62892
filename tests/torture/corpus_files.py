"""Malformed YAML (recipes, merge files, pipelines, settings), manifests and records, and outputs that cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path

from corpus import Case, Damage, both, edited, keyed, linked, nothing, removed, replaced, swapped, text

RECIPE, FILE, PIPELINE, MANIFEST = "recipe.yaml", "merge.yaml", "pipeline.yaml", "rl-2/gemma2.json"
SFT, MERGE = "sft --config recipe.yaml --out out", "merge --config merge.yaml --out out"
RUN, MERGED = "pipeline run pipeline.yaml --out out", "merge linear rl-1 rl-2 --out out"
LAUGH = "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
LAUGH += "".join(f"{k}: &{k} [{', '.join(['*' + j] * 8)}]\n" for j, k in zip("cdefgh", "defghi", strict=True))


def more(name: str, line: str) -> Damage:
    return edited(name, lambda data: data + line.encode() + b"\n")


YAML = {
    "recipe missing": Case(nothing, "sft --config gone.yaml --out out", ("gone.yaml",)),
    "recipe empty": Case(text(RECIPE, ""), SFT, ("recipe.yaml",)),
    "recipe a list": Case(text(RECIPE, "- a\n- b\n"), SFT, ("recipe.yaml",)),
    "recipe a text": Case(text(RECIPE, "hello"), SFT, ("recipe.yaml",)),
    "recipe with a tab": Case(text(RECIPE, "model: base\n\tdata: x\n"), SFT, ("recipe.yaml:2",)),
    "recipe with an open bracket": Case(more(RECIPE, "weights: [1,"), SFT, ("recipe.yaml",)),
    "recipe with an unknown key": Case(more(RECIPE, "epoch: 3"), SFT, ("recipe.yaml:5", "epoch", "epochs"), 2),
    "recipe with a key twice": Case(more(RECIPE, "epochs: 3"), SFT, ("recipe.yaml:5", "epochs", "twice"), 2),
    "recipe with a number out of bounds": Case(
        more(RECIPE, "learning_rate: 5"), SFT, ("recipe.yaml:5", "learning_rate"), 2
    ),
    "recipe with a text for a number": Case(more(RECIPE, "batch_size: many"), SFT, ("recipe.yaml:5", "batch_size"), 2),
    "recipe with NaN": Case(more(RECIPE, "learning_rate: .nan"), SFT, ("recipe.yaml:5", "learning_rate"), 2),
    "recipe with a fraction for a whole": Case(more(RECIPE, "seed: 1.5"), SFT, ("recipe.yaml:5", "seed"), 2),
    "recipe with a date": Case(more(RECIPE, "seed: 2024-99-99"), SFT, ("recipe.yaml",), 2),
    "recipe with an endless number": Case(more(RECIPE, "seed: " + "9" * 5000), SFT, ("recipe.yaml",)),
    "recipe with a Python object": Case(
        more(RECIPE, "seed: !!python/object/apply:os.getpid []"), SFT, ("recipe.yaml:5",)
    ),
    "recipe with a tag that does not fit": Case(more(RECIPE, 'seed: !!int "x"'), SFT, ("recipe.yaml",)),
    "recipe with two documents": Case(more(RECIPE, "---\nseed: 1"), SFT, ("recipe.yaml",)),
    "recipe with an unknown alias": Case(more(RECIPE, "seed: *gone"), SFT, ("recipe.yaml:5", "gone")),
    "recipe with an alias of itself": Case(more(RECIPE, "trainer: &x {a: *x}"), SFT, ("recipe.yaml",)),
    "recipe with a billion laughs": Case(text(RECIPE, LAUGH), SFT, ("recipe.yaml",)),
    "recipe in Latin-1": Case(edited(RECIPE, lambda data: data + b"# \xe9\n"), SFT, ("recipe.yaml", "UTF-8")),
    "recipe with NUL": Case(edited(RECIPE, lambda data: data + b"\0"), SFT, ("recipe.yaml",)),
    "recipe that is a folder": Case(replaced(RECIPE, Path.mkdir), SFT, ("recipe.yaml",)),
    "recipe that is a pipe": Case(replaced(RECIPE, os.mkfifo), SFT, ("recipe.yaml", "regular file")),
    "recipe that is a device": Case(linked(RECIPE, "/dev/zero"), SFT, ("recipe.yaml",)),
    "recipe of another command": Case(nothing, "rlhf --config recipe.yaml --out out", ("recipe.yaml",), 2),
    "recipe too large": Case(edited(RECIPE, lambda data: data + b"# x\n" * 100_000), SFT, ("recipe.yaml",)),
    "recipe with an unknown trainer key": Case(more(RECIPE, "trainer: {lerning_rate: 1}"), SFT, ("lerning_rate",), 2),
    "a setting without a value": Case(nothing, f"{SFT} --set epochs", ("epochs",), 2),
    "an unknown setting": Case(nothing, f"{SFT} --set epoch=1", ("epoch",), 2),
    "an unknown flag": Case(nothing, f"{SFT} --epoch 1", ("--epoch",), 2),
    "an unknown command": Case(nothing, "sfft --model base", ("sfft",), 2),
    "a missing flag": Case(nothing, "sft --data chats.jsonl --out out", ("--model",), 2),
    "merge file without a method": Case(swapped(FILE, "method: linear\n", ""), MERGE, ("merge.yaml", "method"), 2),
    "merge file with an unknown method": Case(swapped(FILE, "linear", "lineer"), MERGE, ("merge.yaml:1", "lineer"), 2),
    "merge file with an unknown key": Case(more(FILE, "denisty: 0.5"), MERGE, ("merge.yaml:3", "denisty"), 2),
    "merge file without models": Case(swapped(FILE, "models: [rl-1, rl-2]\n", ""), MERGE, ("merge.yaml", "model"), 2),
    "merge file with no models": Case(swapped(FILE, "[rl-1, rl-2]", "[]"), MERGE, ("merge.yaml", "models"), 2),
    "merge file with a missing model": Case(swapped(FILE, "rl-2", "gone"), MERGE, ("gone",)),
    "merge file with a number for a model": Case(swapped(FILE, "rl-2", "5"), MERGE, ("5",)),
    "merge file with a weight too many": Case(more(FILE, "weights: [1, 2, 3]"), MERGE, ("weights", "3"), 2),
    "merge file with a wrong rule": Case(
        more(FILE, 'weights: [{filter: "(", value: 1}, 1]'), MERGE, ("merge.yaml:3",), 2
    ),
    "merge file of two merges that need each other": Case(
        text(FILE, "merges:\n  a: {method: linear, models: [b]}\n  b: {method: linear, models: [a]}\n"),
        MERGE,
        ("merge.yaml",),
    ),
    "merge file, planned": Case(swapped(FILE, "linear", "lineer"), "merge plan --config merge.yaml", ("lineer",), 2),
    "mergekit file with an unknown source": Case(
        text(FILE, "merge_method: linear\nmodels:\n- model: gone\n  parameters: {weight: 1}\ndtype: bfloat16\n"),
        MERGE,
        ("gone",),
    ),
    "mergekit file with another dtype": Case(
        text(FILE, "merge_method: linear\nmodels:\n- model: rl-1\n  parameters: {weight: 1}\ndtype: int3\n"),
        MERGE,
        ("merge.yaml", "int3"),
        2,
    ),
    "pipeline missing": Case(nothing, "pipeline run gone.yaml --out out", ("gone.yaml",)),
    "pipeline without stages": Case(text(PIPELINE, "stages: {}\n"), RUN, ("pipeline.yaml", "stages"), 2),
    "pipeline with a list of stages": Case(text(PIPELINE, "stages: [a]\n"), RUN, ("pipeline.yaml", "stages"), 2),
    "pipeline with an unknown command": Case(swapped(PIPELINE, "command: sft", "command: sfft"), RUN, ("sfft",), 2),
    "pipeline with an unknown option": Case(swapped(PIPELINE, "model: base", "modle: base"), RUN, ("modle",), 2),
    "pipeline with an unknown key": Case(swapped(PIPELINE, "options: {model", "option: {model"), RUN, ("option",), 2),
    "pipeline with an unknown stage": Case(swapped(PIPELINE, "${sft.out}", "${rl.out}"), RUN, ("rl",), 2),
    "pipeline with an unknown variable": Case(swapped(PIPELINE, "${sft.out}", "${vars.x}"), RUN, ("vars.x",), 2),
    "pipeline with a stage that needs itself": Case(
        swapped(PIPELINE, "model: base", 'model: "${merged.out}"'), RUN, ("sft", "merged"), 2
    ),
    "pipeline with a missing model": Case(swapped(PIPELINE, "model: base", "model: gone"), RUN, ("stages.sft", "gone")),
    "pipeline with missing data": Case(
        swapped(PIPELINE, "chats.jsonl", "gone.jsonl"), RUN, ("stages.sft", "gone.jsonl")
    ),
    "pipeline with a broken row": Case(edited("chats.jsonl", lambda data: data[:-5]), RUN, ("chats.jsonl:6",)),
    "pipeline with a data set for a model": Case(
        swapped(PIPELINE, "model: base", "model: chats.jsonl"), RUN, ("stages.sft", "chats.jsonl")
    ),
    "pipeline with a wrong condition": Case(more(PIPELINE, "    when: ${sft.summary.loss} <"), RUN, ("when",), 2),
    "pipeline with a stage of a wrong name": Case(
        swapped(PIPELINE, "  merged:", "  ../merged:"), RUN, ("../merged",), 2
    ),
    "pipeline drawn, with an unknown stage": Case(
        swapped(PIPELINE, "${sft.out}", "${rl.out}"), "pipeline graph pipeline.yaml", ("rl",), 2
    ),
    "pipeline, an unknown stage to force": Case(nothing, f"{RUN} --force gone", ("gone",), 2),
    "settings of axolotl that are a list": Case(text("ax.yaml", "- a\n"), "config import ax.yaml", ("ax.yaml",)),
    "settings of nobody": Case(text("ax.yaml", "a: 1\n"), "config import ax.yaml", ("ax.yaml",)),
    "an unknown recipe": Case(nothing, "recipes show gone", ("gone",)),
}


def front(content: str) -> Damage:
    """A folder that says to be a finished front."""
    record = json.dumps({"status": "complete", "command": "pareto", "files": {}})
    return both(text("front/gemma2.json", record), text("front/front.json", content))


def begun(content: str) -> Damage:
    """An interrupted run with a checkpoint, whose record is something else."""
    return both(text(".out.partial/run.json", content), text(".out.partial/checkpoints/checkpoint-1/x", "x"))


RESUME = "sft --model base --data chats.jsonl --out out --resume"
MANIFESTS = {
    "no JSON": Case(text(MANIFEST, "{"), MERGED, (MANIFEST, "not readable JSON")),
    "a list": Case(text(MANIFEST, "[]"), MERGED, (MANIFEST, "not a gemma2 manifest")),
    "a key twice": Case(swapped(MANIFEST, '"status"', '"status": "running", "status"'), MERGED, (MANIFEST, "twice")),
    "files that are a list": Case(keyed(MANIFEST, files=[1]), MERGED, (MANIFEST, "not a gemma2 manifest")),
    "a file that is a number": Case(keyed(MANIFEST, files={"a": 1}), MERGED, (MANIFEST, "not a gemma2 manifest")),
    "a folder": Case(replaced(MANIFEST, Path.mkdir), MERGED, (MANIFEST,)),
    "a pipe": Case(replaced(MANIFEST, os.mkfifo), MERGED, (MANIFEST, "regular file")),
    "a pipe, shown": Case(replaced(MANIFEST, os.mkfifo), "lineage rl-2", (MANIFEST, "regular file")),
    "no status": Case(keyed(MANIFEST, status=...), MERGED, ("rl-2", "unfinished")),
    "deep, trained": Case(
        text("base/gemma2.json", "[" * 100_000), "sft --model base --data chats.jsonl --out out", ("base/gemma2.json",)
    ),
    "lineage: no JSON": Case(text(MANIFEST, "{"), "lineage rl-2", (MANIFEST,)),
    "lineage: missing": Case(nothing, "lineage gone", ("gone",)),
    "verify: no JSON": Case(text(MANIFEST, "{"), "verify rl-2", ("rl-2", "JSON"), 1, True),
    "verify: a changed file": Case(
        edited("rl-2/config.json", lambda data: data + b" "), "verify rl-2", ("rl-2", "config.json"), 1, True
    ),
    "verify: a missing file": Case(removed("rl-2/config.json"), "verify rl-2", ("rl-2", "config.json"), 1, True),
    "verify: nothing recorded": Case(nothing, "verify base", ("base",)),
    "report: no JSON": Case(text(MANIFEST, "{"), "report rl-2", (MANIFEST,)),
    "report: missing": Case(nothing, "report gone", ("gone",)),
    "report: empty": Case(lambda root: (root / "empty").mkdir(), "report empty", ("empty",)),
    "pipeline status: no pipeline": Case(nothing, "pipeline status rl-2", ("rl-2",)),
    "pipeline status: a state that is a list": Case(text("run/pipeline.json", "[]"), "pipeline status run", ("run",)),
    "pipeline status: a state that is cut": Case(
        text("run/pipeline.json", '{"stages": {'), "pipeline status run", ("run",)
    ),
    "pipeline diff: no pipeline": Case(nothing, "pipeline diff rl-1 rl-2", ("rl-1",)),
    "watch: nothing": Case(nothing, "watch gone --once", ("gone",)),
    "pick: no front": Case(nothing, "pick rl-2 --out out", ("rl-2",)),
    "pick: no JSON": Case(front("{"), "pick front --out out", ("front",)),
    "pick: a list": Case(front("[]"), "pick front --out out", ("front",)),
    "pick: no points": Case(front('{"points": []}'), "pick front --out out", ("front",)),
    "pick: points that are numbers": Case(front('{"points": [1]}'), "pick front --out out", ("front",)),
    "pareto: an earlier front that is no JSON": Case(
        front("{"),
        "pareto --policies rl-1 --sft base --reward rm --prompts prompts.jsonl --fronts front --out out",
        ("front",),
    ),
    "resume: nothing": Case(nothing, RESUME, ("out", "--resume")),
    "resume: no JSON": Case(begun("{"), RESUME, (".out.partial",)),
    "resume: empty": Case(begun(""), RESUME, (".out.partial",)),
    "resume: a list": Case(begun("[]"), RESUME, (".out.partial",)),
    "resume: an empty object": Case(begun("{}"), RESUME, (".out.partial",)),
    "resume: deep": Case(begun("[" * 100_000), RESUME, (".out.partial",)),
    "resume: versions that are a list": Case(begun('{"started": "x", "versions": [1]}'), RESUME, (".out.partial",)),
    "resume: of another command": Case(
        begun('{"command": "rlhf", "config": {}, "started": "x"}'), RESUME, (".out.partial",)
    ),
    "resume: a configuration that is a list": Case(
        begun('{"command": "sft", "config": [], "started": 5}'), RESUME, (".out.partial",)
    ),
    "resume: parents that are texts": Case(
        begun('{"command": "sft", "config": {}, "parents": ["x"]}'), RESUME, (".out.partial",)
    ),
    "resume: data that are numbers": Case(
        begun('{"command": "sft", "config": {}, "data": [5]}'), RESUME, (".out.partial",)
    ),
    "not resumed: a begun run": Case(begun("{}"), RESUME.removesuffix(" --resume"), ("out", "--resume")),
    "a teacher's cache that is no cache": Case(
        nothing, "distill --model base --teacher-cache rl-2 --out out", ("rl-2",)
    ),
    "a teacher's cache without an index": Case(
        text("cache/gemma2.json", json.dumps({"status": "complete", "command": "distill cache", "files": {}})),
        "distill --model base --teacher-cache cache --out out",
        ("cache",),
    ),
}

OUTPUTS = {
    "exists": Case(
        lambda root: (root / "out").mkdir() or (root / "out/gemma2.json").write_text("{}"),
        MERGED,
        ("--out out exists",),
    ),
    "of others": Case(text("out/notes.txt", "precious"), MERGED, ("out", "something else")),
    "of others, forced": Case(text("out/notes.txt", "precious"), f"{MERGED} --force", ("out", "something else")),
    "a file": Case(text("out", "precious"), MERGED, ("out", "not a directory")),
    "a file, forced": Case(text("out", "precious"), f"{MERGED} --force", ("out", "not a directory")),
    "a link": Case(linked("out", "base"), MERGED, ("out", "link")),
    "a link to another folder": Case(
        both(lambda root: (root / "aside").mkdir(), linked("out", "aside")), f"{MERGED} --force", ("out", "link")
    ),
    "a link to nothing": Case(linked("out", "gone"), MERGED, ("out", "link")),
    "an input": Case(nothing, "merge linear rl-1 rl-2 --out rl-1 --force", ("rl-1", "overlap")),
    "inside an input": Case(nothing, "merge linear rl-1 rl-2 --out rl-1/out", ("rl-1", "overlap")),
    "around an input": Case(nothing, "merge linear rl-1 rl-2 --out . --force", ("--out .",)),
    "under a file": Case(nothing, "merge linear rl-1 rl-2 --out recipe.yaml/out", ("recipe.yaml",)),
    "in /proc": Case(nothing, "merge linear rl-1 rl-2 --out /proc/out", ("/proc",)),
    "with a name too long": Case(nothing, f"merge linear rl-1 rl-2 --out {'x' * 300}", ("xxx",)),
    "without a name": Case(nothing, "merge linear rl-1 rl-2 --out ..", ("..",)),
    "a lock that is a link": Case(linked(".out.lock", "/tmp/elsewhere"), MERGED, (".out.lock",)),
    "a lock that is a folder": Case(lambda root: (root / ".out.lock").mkdir(), MERGED, (".out.lock",)),
    "a partial run that is a link": Case(
        linked(".out.partial", "base"), "sft --model base --data chats.jsonl --out out", (".out.partial", "link")
    ),
    "sft: exists": Case(
        text("out/notes.txt", "precious"),
        "sft --model base --data chats.jsonl --out out --force",
        ("out", "something else"),
    ),
    "sft: an input": Case(nothing, "sft --model rl-2 --data chats.jsonl --out rl-2 --force", ("rl-2", "overlap")),
    "sft: in /proc": Case(nothing, "sft --model base --data chats.jsonl --out /proc/out", ("/proc",)),
    "filter: a file": Case(text("out", "precious"), "filter chats.jsonl --out out", ("out", "not a directory")),
    "data convert: exists": Case(
        nothing, "data convert chats.jsonl --to conversations --out pairs.jsonl", ("pairs.jsonl",)
    ),
    "data convert: the input": Case(
        nothing, "data convert chats.jsonl --to conversations --out chats.jsonl --force", ("chats.jsonl",)
    ),
    "pipeline: a file": Case(text("out", "precious"), RUN, ("out",)),
    "pipeline: of others": Case(text("out/notes.txt", "precious"), RUN, ("out",)),
    "report: a folder": Case(nothing, "report rl-2 --out base", ("base",)),
    "report: exists": Case(text("report.html", "precious"), "report rl-2", ("report.html",)),
    "lineage: exists": Case(nothing, "lineage rl-2 --out recipe.yaml", ("recipe.yaml",)),
    "lora: exists": Case(
        text("out/notes.txt", "x"), "merge extract-lora rl-2 --base base --rank 1 --out out", ("out", "something else")
    ),
    "convert: no model": Case(nothing, "convert chats.jsonl --out out", ("chats.jsonl",)),
}
