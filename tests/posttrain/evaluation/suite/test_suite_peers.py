"""Equality with lm-eval's own tasks and its HFLM on the same rows and model: `make test-peers`."""

import json
from pathlib import Path

import pytest
from miniature_tasks import Miniature

from gemma2.posttrain.evaluation.suite.results import read_results
from gemma2.posttrain.evaluation.suite.run_suite import run_suite
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.measures import SuiteConfig
from gemma2.posttrain.tiny.networks import save_random

pytestmark = pytest.mark.peers
pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-peers")

SHOTS = {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "gsm8k": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("models") / "policy", 5)


FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


def write_tasks(folder, hub):
    """Write lm-eval's own tasks with their data sets replaced by files; their names."""
    import lm_eval

    theirs, found = Path(lm_eval.__file__).parent / "tasks", []
    for task, rows in hub.items():
        groups = {f"mmlu_{row['subject']}": row["subject"] for row in rows} if task == "mmlu" else {task: None}
        for name, subject in groups.items():
            files = {}
            for split in {row["split"] for row in rows}:
                kept = [row for row in rows if row["split"] == split and row.get("subject") == subject]
                files[split] = str(folder / f"{name}-{split}.jsonl")
                lines = [json.dumps({key: value for key, value in row.items() if key != "split"}) for row in kept]
                (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
            config = {"include": str(theirs / FILES.get(task, f"mmlu/default/{name}.yaml")), "task": name}
            config |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": SHOTS[task]}
            config |= {"dataset_kwargs": {"data_files": files}}
            if "train" not in files and task != "mmlu":  # as in our suite: examples are other rows of the split
                (split,) = files
                config |= {
                    "training_split": None,
                    "validation_split": None,
                    "test_split": split,
                    "fewshot_split": split,
                }
            (folder / f"{name}.yaml").write_text(json.dumps(config))
            found.append(name)
    return found


def of_lm_eval(model, folder, hub, **options):
    """lm-eval's results and samples by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    options |= {"tasks": write_tasks(folder, hub)}
    options |= {"task_manager": TaskManager(include_path=str(folder), include_defaults=False)}
    lm = HFLM(pretrained=str(model), dtype="float32", batch_size=4, device="cpu", attn_implementation="eager")
    return simple_evaluate(model=lm, log_samples=True, bootstrap_iters=10, gen_kwargs="max_gen_toks=24", **options)


def ours(model, data, out, **options):
    run_suite(SuiteConfig(model=model, data=data, **options), RunOptions(out))
    samples = {
        path.stem: [json.loads(line) for line in path.read_bytes().splitlines()]
        for path in (out / "samples").glob("*.jsonl")
    }
    return read_results(out), samples


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [True, False], ids=["train split", "examples of the same split"])
@pytest.mark.parametrize("chat", ["off", "turns", "one turn"])
def test_log_likelihoods_answers_and_metrics_are_those_of_lm_eval(model, tmp_path, train, chat):
    made = Miniature(train=train)
    # lm-eval drops MMLU's description where the chat template has no system role; here it begins the first turn.
    same = train and chat == "off"
    hub = made.hub if same else {task: rows for task, rows in made.hub.items() if task != "mmlu"}
    theirs = of_lm_eval(model, tmp_path, hub, apply_chat_template=chat != "off", fewshot_as_multiturn=chat == "turns")
    results, samples = ours(
        model,
        made.write(tmp_path / "data"),
        tmp_path / "out",
        tasks=tuple(hub),
        chat="off" if chat == "off" else "on",
        fewshot_as_multiturn=chat == "turns",
        max_new_tokens=24,
    )
    for task in hub:
        names = [f"mmlu_{group}" for group in results["tasks"][task]["groups"]] if task == "mmlu" else [task]
        mine = iter(samples[task])
        for name in names if task != "mmlu" else dict.fromkeys(f"mmlu_{row['group']}" for row in samples[task]):
            rows = {}
            for row in theirs["samples"][name]:
                rows.setdefault(row["doc_id"], []).append(row)
            for variants in rows.values():
                compare(task, variants, next(mine))
        for name in names:
            compare_metrics(task, theirs["results"][name], results["tasks"][task], name.removeprefix("mmlu_"))


def compare(task, variants, row):
    first = variants[0]
    prompts = row["prompt"] if isinstance(row["prompt"], list) else [row["prompt"]]
    assert [pair[0] for pair in first["arguments"]][: len(prompts)] == prompts
    if task == "gsm8k":
        assert first["resps"][0][0] == row["answer"]
        for variant in variants:
            assert variant["exact_match"] == row["correct"][variant["filter"]]
        return
    values = [float(pair[0][0]) for pair in first["resps"]]
    assert row["logprobs"] == pytest.approx(values, abs=1e-4)
    for metric, right in row["correct"].items():
        assert first[metric] == right, metric


def compare_metrics(task, theirs, found, group):
    if task == "mmlu":
        assert found["groups"][group]["acc"] == pytest.approx(theirs["acc,none"])
        return
    names = {name: f"exact_match,{name}" for name in ("strict-match", "flexible-extract")}
    for name, value in found["metrics"].items():
        assert value == pytest.approx(theirs[names.get(name, f"{name},none")]), name
        assert found["stderr"][name] == pytest.approx(
            float(theirs[names.get(name, f"{name},none").replace(",", "_stderr,")])
        )


@pytest.mark.filterwarnings("ignore")
def test_the_engine_of_lm_eval_gives_the_same_results(model, tmp_path):
    data = Miniature().write(tmp_path / "data")
    mine, samples = ours(model, data, tmp_path / "ours", chat="off")
    theirs, others = ours(model, data, tmp_path / "hf", chat="off", engine="hf")
    assert {name: task["metrics"] for name, task in mine["tasks"].items()} == {
        name: task["metrics"] for name, task in theirs["tasks"].items()
    }
    for task, rows in samples.items():
        for row, other in zip(rows, others[task], strict=True):
            assert row["prompt_ids_hash"] == other["prompt_ids_hash"]
            assert row.get("answer") == other.get("answer")
            assert row.get("logprobs", []) == pytest.approx(other.get("logprobs", []), abs=1e-4)
