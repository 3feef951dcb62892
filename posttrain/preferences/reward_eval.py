"""Reward models compared on preference pairs: the figures of `ranking_metrics.py`, a reliability table, sources apart.

WARM (2401.12187) selects and judges reward models by their accuracy out of distribution, so several models are
evaluated on one set of pairs, with separate figures for the pairs of every value of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import GuardStop, InputError
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import Ranks
from gemma2.posttrain.attention.choice import kernels_in, settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Pair
from gemma2.posttrain.models.loading import default_device, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.rewards.model import RewardModel
from gemma2.posttrain.runs.run_directory import Parent, check_parents
from gemma2.posttrain.runs.together import together
from gemma2.posttrain.schemas import RewardEvalConfig

from .pair_examples import PairIds, report_dropped, tokenise_pairs
from .ranking_metrics import reliability
from .score import score_rows
from .train import measure_rewards

__all__ = ["run_reward_eval"]

MOST_GROUPS = 100  # values of a column: more would not be a readable table


def run_reward_eval(config: RewardEvalConfig, progress: Progress = SILENT) -> JsonObject:
    """Return {"data", "pairs", "models": [{"model", figures, "reliability": rows, "by": {value: figures}}]}.

    The processes of a job share the rows; each returns the whole.

    Raises InputError for unusable data or models, and for a column that rows do not have, GuardStop for a model whose
    scores are not finite.
    """
    quiet_libraries()
    with together(config) as ranks:
        progress = progress if ranks.is_main else SILENT
        check_parents([Parent("models", path) for path in config.models])
        settled = settle_attention(
            config.attention, config.models, progress, dtype=frozen_dtype(config.dtype), device=default_device()
        )
        reading = Reading(config)
        pairs = reading.pairs(config.data, config.limit)
        if config.by is not None:
            check_column(pairs, config.by)
        evaluation = _Evaluation(pairs, config, reading, ranks)
        models = [evaluation.of(path, progress) for path in config.models]
        reading.report(progress)
    return {"data": str(config.data), "pairs": len(pairs), "models": models, "attention": kernels_in(settled)}


@dataclass(frozen=True)
class _Evaluation:
    """Pairs, and the processes that score them."""

    pairs: Sequence[Pair]
    config: RewardEvalConfig
    reading: Reading
    ranks: Ranks

    def of(self, path: Path, progress: Progress) -> JsonObject:
        """Return the figures of one reward model."""
        config, pairs = self.config, self.pairs
        model = RewardModel.from_dir(path, frozen_dtype(config.dtype), config.attention)
        longest = config.max_length or getattr(model.model.config, "max_position_embeddings", None)
        kept, dropped = tokenise_pairs(pairs, ChatFormat(model.tokenizer), longest, self.reading)
        report_dropped(dropped, len(pairs), longest, progress)
        rows = [pair.chosen for pair in kept] + [pair.rejected for pair in kept]
        with progress.task(f"score {path.name}", total=len(rows), unit="completions") as bar:
            rewards = score_rows(model, rows, config.batch_size, bar, self.ranks).view(2, -1)
        if not rewards.isfinite().all():
            raise GuardStop(f"{path} gives a score that is NaN or infinite", "check its weights")
        found: JsonObject = {"model": str(path), "pairs": len(kept), **dropped, **measure_rewards(rewards, kept)}
        found["reliability"] = reliability(rewards)
        if config.by is not None:
            found["by"] = {}
            for value, places in _groups(kept, config.by).items():
                figures = measure_rewards(rewards[:, places], [kept[i] for i in places])
                found["by"][value] = {"pairs": len(places), **figures}
        return found


def check_column(pairs: Sequence[Pair], column: str) -> None:
    """Refuse a column that is missing from a row, or has too many values for a readable table."""
    for pair in pairs:
        if column not in pair.extra:
            have = ", ".join(pair.extra) or "no further columns"
            raise InputError(f"{pair.where}: no '{column}' for --by", f"give one of the columns: {have}")
    count = len({str(pair.extra[column]) for pair in pairs})
    if count > MOST_GROUPS:
        raise InputError(f"'{column}' has {count} different values", f"give a column with at most {MOST_GROUPS}")


def _groups(pairs: Sequence[PairIds], column: str) -> dict[str, list[int]]:
    """Return value of the column -> indices of its pairs, sorted by value."""
    found: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        assert pair.source is not None
        found.setdefault(str(pair.source.extra[column]), []).append(number)
    return dict(sorted(found.items()))
