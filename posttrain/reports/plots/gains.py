"""Gains of a point in words: over the policy from which RL started, and over the best single RL run. Pure.

A gain is called one only if its 95 % interval does not hold 0; else no gain could be shown. Figures are the columns of
`evaluation/comparison.py`: differences on the same prompts, with the standard error of their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gemma2.core.json_files import JsonMapping

from .point_kinds import is_merged
from .values import fixed, label_of, rounded, start_of

__all__ = [
    "CHOICE_NOTE",
    "GAINS_NOTE",
    "bounds_of",
    "called",
    "gain_of",
    "gain_sentences",
    "is_certain",
    "merges_sentence",
    "scale_of",
]

SINGLE = "reward_over_single"
GAINS_NOTE = (
    "± is the standard error of the difference, paired over the prompts; a gain or loss is shown if its 95 % interval "
    "does not hold 0. A single run is RL without a merge before it."
)


def called(point: JsonMapping) -> str:
    """The label of a point, also of a front that was written without labels."""
    return str(point.get("label") or label_of(point))


CHOICE_NOTE = (
    "The best of several noisy points is partly the luckiest, so its reward is too high on average. The reward on "
    "other prompts is corrected for that: in each of many resamples of the prompts the point is chosen anew, and "
    "measured on the prompts that the resample left out."
)


def bounds_of(front: JsonMapping, points: Sequence[JsonMapping]) -> str:
    """The reference point of a front's area in words, with where it is from; "" if it is not recorded.

    front: the content of front.json. points: its points.
    """
    ends = front.get("reference")
    ends = ends if isinstance(ends, Mapping) else {}
    kl, reward = ends.get("kl"), ends.get("reward")
    if not (isinstance(kl, int | float) and isinstance(reward, int | float)):
        return ""
    source, start = front.get("reference_from"), start_of(points)
    farthest = next((point for point in points if point["name"] == front.get("reference_point")), None)
    if source in ("--reference", "--fronts"):
        of = "the reference point of the earlier fronts" if source == "--fronts" else "as --reference says"
        return f"KL {fixed(kl, 2)} and reward {fixed(reward, 2)} ({of})"
    if farthest is None:
        return f"KL {fixed(kl, 2)} and reward {fixed(reward, 2)}"
    if farthest["kind"] == "sft":
        return f"KL {fixed(kl, 2)} and reward {fixed(reward, 2)}: no point has more reward than {start}"
    return (
        f"KL {fixed(kl, 2)} (of {called(farthest)}, the farthest point with more reward than {start}) "
        f"and reward {fixed(reward, 2)} (of {start})"
    )


def scale_of(metric: str) -> float:
    """Factor from a metric to the figure shown: accuracies are shown in percent."""
    return 100.0 if metric == "accuracy" else 1.0


def is_certain(point: JsonMapping, key: str) -> bool | None:
    """Whether a gain is more than chance: its interval does not hold 0. None if the gain is unknown."""
    low, high = point.get(f"{key}_low"), point.get(f"{key}_high")
    if low is None or high is None or point.get(key) is None:
        return None
    return not low <= 0 <= high


def gain_of(point: JsonMapping, key: str, scale: float = 1.0, sign: str = "+") -> str:
    """A gain with its error, `+0.05 ± 0.13`."""
    value, error = (float(point.get(f"{key}{part}") or 0.0) * scale for part in ("", "_se"))
    return f"{rounded(value, error, sign)} ± {rounded(error, error)}" if error else rounded(value, error, sign)


def gain_sentences(point: JsonMapping, start: str) -> Iterator[str]:
    """Sentences about the reward of a point: over `start`, the policy from which RL started, and over a single run."""
    names = {
        "reward_over_start": f"{start}, the policy from which RL started",
        "reward_over_single": f"the best single run at no more KL ({point.get('single')})",
    }
    for key, other in names.items():
        certain = is_certain(point, key)
        if certain is None:
            continue
        if not certain:
            yield f"{called(point)}: no gain in reward over {other} could be shown: {gain_of(point, key)}."
        elif point[key] > 0:
            yield f"{called(point)} gains {gain_of(point, key)} reward over {other}."
        else:
            yield f"{called(point)} loses {gain_of({**point, key: -point[key]}, key, sign='')} reward against {other}."
    if point.get("on_front") is False:
        yield f"{called(point)} is not on the front: another measured point has at least its reward at no more KL."
    losses = list(_losses(point))
    if losses:
        yield f"Against that run {called(point)} is worse in {' and '.join(losses)}."


def _losses(point: JsonMapping) -> Iterator[str]:
    """The other scores in which a point is worse than the best single run, beyond chance."""
    for key in point:
        metric = key.removesuffix("_over_single")
        if metric in (key, "reward") or not is_certain(point, key) or point[key] > 0:
            continue
        unit = " points" if metric == "accuracy" else ""
        yield f"{metric.replace('_', ' ')} ({gain_of(point, key, scale_of(metric))}{unit})"


def merges_sentence(points: Sequence[JsonMapping]) -> str | None:
    """How many merged points have more, and how many less reward than single runs at no more KL; None without any."""
    merged = [point for point in points if is_merged(point["kind"]) and is_certain(point, SINGLE) is not None]
    merged = list({called(point): point for point in merged}.values())  # the end of a line is the SLERP
    if not merged:
        return None
    certain = [point for point in merged if is_certain(point, SINGLE)]
    count = f"of the {len(merged)} merged models" if len(merged) > 1 else "of the merged model"
    among = certain or [point for point in merged if not str(point.get("single")).startswith("a place between")]
    clearest = max(among, key=lambda point: abs(point[SINGLE]) / (point.get(f"{SINGLE}_se") or 1.0), default=None)
    figure = ""
    if clearest is not None:
        figure = f"; the clearest: {called(clearest)}, {gain_of(clearest, SINGLE)} against {clearest.get('single')}"
    if not certain:
        return f"No gain or loss {count} against the single runs at no more KL could be shown{figure}."
    more = sum(point[SINGLE] > 0 for point in certain)
    return (
        f"Against the single runs at no more KL, a gain in reward could be shown for {more} {count} and a loss for "
        f"{len(certain) - more}{figure}."
    )
