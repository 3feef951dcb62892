"""A reward model by its files: one output, a head that is there and not zero, padding that is known."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Check, Depth, Diagnosis, fine, problem, warning
from .subject import REWARD, Subject

__all__ = ["CHECKS"]


def _head(subject: Subject) -> Iterator[Diagnosis]:
    """One output, a head that is there and not zero, padding that is known."""
    labels = subject.settings.get("num_labels") or len(subject.settings.get("id2label") or ())
    if labels != 1:
        yield problem(f"{labels} outputs, a reward model has one", "train one with gemma2 reward")
        return
    head = subject.tensors.get("score.weight")
    if head is None:
        yield problem("there is not any score.weight: the head would be random", "use the reward model's own weights")
        return
    with head.file.open("rb") as file:
        file.seek(head.offset)
        if not any(file.read(head.nbytes)):
            yield problem("score.weight is zero: every text gets the same score", "train it with gemma2 reward")
            return
    if not isinstance(subject.config.get("pad_token_id"), int):
        yield warning("config.json has no pad_token_id: batches are scored wrongly by other tools", "set pad_token_id")
        return
    yield fine(f"one output, head {list(head.shape)}")


CHECKS = (Check("head", "a reward model's one output, its head, its padding", Depth.QUICK, frozenset({REWARD}), _head),)
