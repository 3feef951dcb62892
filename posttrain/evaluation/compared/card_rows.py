"""The figures of an evaluation as rows of a model card: `model-index` of the hub's card metadata. Pure.

    task     text-generation
    dataset  the hub's id of the data set, its split, the shots as arguments
    metrics  one per metric of the task: type, value in per cent, and its name with the standard error

`verified` is absent: nobody but the author has run it. Source: the hub's model card specification (hub-docs,
modelcard.md). A reader of the card sees the same figures as results.json states, rounded to what the error allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gemma2.core.json_files import JsonMapping, JsonObject

__all__ = ["model_index", "with_card_rows"]

NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "acc_by_size": "accuracy, all rows alike",
    "strict-match": "exact match, strict",
    "flexible-extract": "exact match, flexible",
    "exact": "exact match",
    "numeric": "numeric match",
}
TYPES = {
    **dict.fromkeys(("strict-match", "flexible-extract", "exact", "numeric"), "exact_match"),
    "acc_by_size": "acc",
}
DATA_SETS = {
    "mmlu": ("cais/mmlu", "all"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "gsm8k": ("openai/gsm8k", "main"),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "hellaswag": ("Rowan/hellaswag", ""),
}
SHARE = 100.0


def with_card_rows(document: JsonMapping) -> JsonObject:
    """A result with its rows for the card as `model_index`."""
    return {**document, "model_index": list(model_index(document))}


def model_index(document: JsonMapping) -> Iterator[JsonObject]:
    """One row per task of a result, each with all metrics of the task."""
    for name, found in document["tasks"].items():
        shots = found.get("shots")
        title = str(found.get("title", name))
        data_set, config = DATA_SETS.get(name, (name, ""))
        args: JsonObject = {key: found[key] for key in ("fewshot_from",) if found.get(key)}
        if shots is not None:
            args = {"num_few_shot": shots, **args}
        if found.get("n") is not None:
            args["rows"] = found["n"]
        yield {
            "task": {"type": "text-generation"},
            "dataset": {
                "type": data_set,
                "name": f"{title} ({shots}-shot)" if shots is not None else title,
                **({"config": config} if config else {}),
                **({"split": found["split"]} if found.get("split") else {}),
                "args": args,
            },
            "metrics": list(_metrics(found)),
        }


def _metrics(found: JsonMapping) -> Iterator[JsonObject]:
    errors: Mapping[str, float] = found.get("stderr", {})
    for metric, value in found["metrics"].items():
        if value is None:
            continue
        share = is_share(found, metric)
        scale = SHARE if share else 1.0
        error = errors.get(metric)
        spread = f" +- {scale * error:.2f}" if error is not None else ""
        label = NAMES.get(metric, metric.replace("_", " "))
        yield {
            "type": TYPES.get(metric, metric),
            "value": round(scale * value, 2 if share else 4),
            "name": f"{label}{', %' if share else ''}{spread}",
        }


def is_share(found: JsonMapping, metric: str) -> bool:
    """Whether a metric is a share of rows, which tables give in per cent."""
    value = found["metrics"].get(metric)
    return metric in NAMES and value is not None and 0 <= value <= 1
