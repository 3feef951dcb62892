"""Measuring a policy: reward, KL to the SFT policy, length, truncation and diversity on held-out prompts.

KL is per sequence, in nats, to the SFT policy (WARP 2406.16768, figures 3 to 5 plot it), by the Rao-Blackwellised
estimator: the sampled log-ratio of every token is replaced by its expectation under the policy,

    KL(pi || ref) = E_{y ~ pi} sum_t  sum_v pi(v | x, y_<t) [log pi(v | x, y_<t) - log ref(v | x, y_<t)],

which has the same mean by the chain rule, a variance that is never larger, and no negative terms. Both distributions
are taken at the sampling temperature. The sum runs to the stop token or to the limit, so it is the KL between the two
distributions over completions cut at `max_new_tokens`.

Deviation: at temperature 0 the policy has no distribution; completions are greedy and the sum along them is taken at
temperature 1, which describes that path and estimates no expectation.

Every policy draws with common random numbers: the same uniforms for the same slot of the same prompt, so differences
between policies carry less noise than their separate standard errors say (`difference` gives the paired one).
Standard errors are clustered by prompt: the n completions of a prompt are averaged first. Each comes with a 95 %
confidence interval, Student's t over the prompts, cut to what the quantity can be. One of zero width says that no
prompt differed from another, not that the value is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gemma2.core.errors import InputError
from gemma2.core.json_files import JsonMapping, JsonObject
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.progress import SILENT, Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.attention.choice import kernels_in, settle_attention
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.data.reading import Reading
from gemma2.posttrain.data.rows import Prompt
from gemma2.posttrain.models.head import head_logits
from gemma2.posttrain.models.loading import default_device, load_policy, quiet_libraries
from gemma2.posttrain.models.precision import frozen_dtype
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import SamplingParams, evaluating, random_numbers, sample
from gemma2.posttrain.models.scorer import CHUNK, hidden_states, mean_and_error
from gemma2.posttrain.rewards.functions import Sampled, Score, function_score
from gemma2.posttrain.rewards.terms import reward_score
from gemma2.posttrain.runs.together import together
from gemma2.posttrain.schemas import DistributionConfig, EvalConfig
from gemma2.posttrain.sharding.lending import is_lent, opened, opened_heads

from .intervals import confidence_interval

__all__ = ["Estimate", "MeasureSettings", "Measurement", "difference", "measure", "run_eval", "sequence_kl"]

# The metrics of every policy besides the scores, and the range of each.
BOUNDS = {"kl": (0.0, math.inf), "length": (0.0, math.inf), "truncated": (0.0, 1.0), "distinct_2": (0.0, 1.0)}
OWN_METRICS = frozenset(BOUNDS)


@dataclass(frozen=True)
class MeasureSettings:
    """Settings for drawing completions: the same for every policy of a comparison."""

    sampling: SamplingParams
    batch_size: int = 32  # sequences at once
    seed: int = 0
    keep: int = 8  # prompts whose first completion is kept as a sample row
    ranks: Ranks = ALONE  # the processes that share the prompts; each of them gets the whole result


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, its standard error (of a single prompt NaN), and the number of prompts."""

    mean: float
    se: float
    prompts: int


@dataclass(frozen=True)
class Measurement:
    """The figures of one policy on the held-out prompts.

    per_prompt: metric -> mean over the completions of each prompt; reward, kl (nats), length (tokens, the stop token
    included), truncated (share), and every key of the scores. A score that does not apply to a completion is left out
    of the mean; one that applies to none of a prompt is NaN there, and its estimate is over the other prompts.
    distinct_2: distinct token bigrams / all bigrams over the whole set (Li et al. 2016, 1510.03055), jackknife error.
    """

    per_prompt: Mapping[str, Sequence[float]]
    distinct_2: Estimate
    n: int  # completions
    samples: Sequence[JsonMapping] = field(default_factory=list)

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Every metric with its standard error, clustered by prompt."""
        found = {
            name: estimate(values if name in OWN_METRICS else [value for value in values if not math.isnan(value)])
            for name, values in self.per_prompt.items()
        }
        return found | {"distinct_2": self.distinct_2}

    def columns(self) -> dict[str, float | None]:
        """Flat: `{"reward": ..., "reward_se": ..., "reward_low": ..., "reward_high": ..., ...}`.

        An error that cannot be estimated from one prompt is None, and so is a score that applies to no completion.
        """
        flat: dict[str, float | None] = {}
        for name, value in self.estimates.items():
            applies = name in OWN_METRICS or not math.isnan(value.mean)
            bounds = BOUNDS.get(name, (-math.inf, math.inf))
            low, high = confidence_interval(value.mean, value.se, value.prompts, bounds) or (None, None)
            flat |= {
                name: value.mean if applies else None,
                f"{name}_se": value.se if math.isfinite(value.se) else None,
                f"{name}_low": low,
                f"{name}_high": high,
            }
        return flat


Part = tuple[Sampled, dict[str, list[float]]]  # completions, and a value for each by metric


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent values."""
    return Estimate(*mean_and_error(torch.tensor(list(values), dtype=torch.float64)), len(values))


def difference(a: Measurement, b: Measurement, metric: str = "reward") -> Estimate:
    """a - b, paired by prompt: the difficulty of a prompt cancels."""
    pairs = zip(a.per_prompt[metric], b.per_prompt[metric], strict=True)
    return estimate([left - right for left, right in pairs])


def measure(
    model: CausalLM,
    reference: CausalLM,
    chat: ChatFormat,
    rows: Sequence[Prompt],
    scores: Sequence[Score],
    settings: MeasureSettings,
    progress: Progress = SILENT,
    label: str = "measuring",
) -> Measurement:
    """Sample, score and compare one policy with the reference (the SFT policy).

    Each of `scores` returns named columns with one value per completion; names must differ from each other and from kl,
    length, truncated, distinct_2.
    """
    if not rows:
        raise InputError("no held-out prompt is left", "give a file with at least two prompts")
    params = settings.sampling
    generator = torch.Generator().manual_seed(settings.seed)
    # Prompts a chunk, of each process: enough to sort by length, few enough to watch.
    size = max(1, 4 * settings.batch_size // params.n) * settings.ranks.size
    parts: list[Part | None] = []
    with evaluating(model), evaluating(reference), progress.task(label, total=len(rows), unit="prompts") as task:
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            uniforms = random_numbers(len(chunk) * params.n, params, generator)
            own = settings.ranks.share(len(chunk))
            uniforms = uniforms[own.start * params.n : own.stop * params.n]
            with opened(model):
                sampled = _drawn(model, chat, chunk[own], uniforms, settings)
            asked = sampled.rows or is_lent(model)  # then every process opens every model, if need be without a row
            values = _values(model, reference, sampled, scores, settings) if asked else {}
            parts.append((sampled, values) if sampled.rows else None)
            task.advance(len(chunk))
    of_every_chunk = zip(*settings.ranks.gather(parts), strict=True)
    return _collect([part for parts in of_every_chunk for part in parts if part is not None], settings)


def _pad_id(chat: ChatFormat) -> int:
    pad = chat.tokenizer.pad_token_id
    return int(pad) if pad is not None else 0


def _drawn(
    model: CausalLM, chat: ChatFormat, rows: Sequence[Prompt], uniforms: Tensor, settings: MeasureSettings
) -> Sampled:
    """Completions of the rows with these random numbers."""
    params, size = settings.sampling, settings.batch_size
    prompts = [chat.prompt_ids(row.messages) for row in rows]
    drawn = sample(model, prompts, params, chat.stop_ids, _pad_id(chat), None, size, uniforms)
    return Sampled(
        rows=[rows[i] for i in drawn.prompt_index],
        prompts=[prompts[i] for i in drawn.prompt_index],
        completions=drawn.ids,
        texts=[chat.decode(ids) for ids in drawn.ids],
        truncated=drawn.truncated,
    )


@torch.no_grad()
def _values(
    model: CausalLM, reference: CausalLM, sampled: Sampled, scores: Sequence[Score], settings: MeasureSettings
) -> dict[str, list[float]]:
    """One value per completion for every metric but diversity."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, column in score(sampled).items():
            if name in values or name in OWN_METRICS:
                raise InputError(f"two scores are named {name!r}", "rename the key that the score function returns")
            values[name] = [float(value) for value in column]
    temperature = settings.sampling.temperature or 1.0
    kl = sequence_kl(model, reference, sampled.prompts, sampled.completions, temperature, settings.batch_size)
    values["kl"] = kl.tolist()
    values["length"] = [float(len(ids)) for ids in sampled.completions]
    values["truncated"] = [float(cut) for cut in sampled.truncated]
    return values


def _collect(parts: Sequence[Part], settings: MeasureSettings) -> Measurement:
    n = settings.sampling.n
    per_prompt: dict[str, list[float]] = {name: [] for name in parts[0][1]}
    samples: list[JsonObject] = []
    groups: list[list[Sequence[int]]] = []
    for sampled, values in parts:
        for name, column in values.items():
            per_prompt[name] += [_mean(name, column[i : i + n]) for i in range(0, len(column), n)]
        groups += [list(sampled.completions[i : i + n]) for i in range(0, len(sampled.completions), n)]
        for i in range(0, len(sampled.texts), n):
            if len(samples) < settings.keep:
                samples.append(_sample_row(sampled, values, i))
    return Measurement(per_prompt, distinct_bigrams(groups), n * len(groups), samples)


def _sample_row(sampled: Sampled, values: Mapping[str, Sequence[float]], i: int) -> JsonObject:
    return {
        "prompt": sampled.rows[i].messages,
        "completion": sampled.texts[i],
        **{name: None if math.isnan(column[i]) else round(column[i], 6) for name, column in values.items()},
    }


def _mean(name: str, values: Sequence[float]) -> float:
    """The mean; of a score over the completions that it applies to, NaN where it applies to none."""
    found = [value for value in values if name in OWN_METRICS or not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def distinct_bigrams(groups: Sequence[Sequence[Sequence[int]]]) -> Estimate:
    """Distinct token bigrams / all bigrams over every completion, with a delete-one-prompt jackknife error.

    groups: the completions (token ids) of each prompt. 0 where no completion has two tokens.
    """
    counts = [Counter(pair for ids in group for pair in pairwise(ids)) for group in groups]
    holders = Counter(pair for count in counts for pair in count)  # bigram -> prompts that have it
    total, distinct = sum(count.total() for count in counts), len(holders)
    left_out = []
    for count in counts:
        only_here = sum(1 for pair in count if holders[pair] == 1)
        rest = total - count.total()
        left_out.append((distinct - only_here) / rest if rest else 0.0)
    values = torch.tensor(left_out, dtype=torch.float64)
    spread = ((values - values.mean()) ** 2).sum().item() * (len(values) - 1) / len(values)
    se = math.sqrt(spread) if len(values) > 1 else math.nan
    return Estimate(distinct / total if total else 0.0, se, len(values))


@torch.no_grad()
def sequence_kl(
    model: CausalLM,
    reference: CausalLM,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Tensor:
    """Rao-Blackwellised KL(model || reference) of each completion: (N,) float64 nats, summed over its positions.

    prompts, completions: N token id sequences each, drawn from `model` at `temperature`. Logits are made for completion
    positions only, a chunk at a time, so that a vocabulary of 256k fits.
    """
    kl = torch.zeros(len(completions), dtype=torch.float64)
    if model is reference:
        return kl
    batches = [_predicting_states(each, prompts, completions, batch_size) for each in (model, reference)]
    size = max(1, CHUNK // int(model.config.vocab_size))
    with opened_heads(model, reference):
        for (batch, own), (_, other) in zip(*batches, strict=True):
            pairs = zip(own.split(size), other.split(size), strict=True)
            per_token = torch.cat(
                [
                    _token_kl(head_logits(model, left) / temperature, head_logits(reference, right) / temperature)
                    for left, right in pairs
                ]
            )
            lengths = [len(completions[i]) for i in batch]
            kl[batch] = torch.stack([values.sum() for values in per_token.cpu().split(lengths)])
    return kl


def _predicting_states(
    model: CausalLM, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int
) -> Iterable[tuple[list[int], Tensor]]:
    """(indices, the states (K, d) that predict their completion tokens) of every batch; of a lent model all at once, so
    that whole models take the memory one after another, and only heads together.
    """
    if not is_lent(model):
        return _states_of_batches(model, prompts, completions, batch_size)
    with opened(model):
        return list(_states_of_batches(model, prompts, completions, batch_size))


def _states_of_batches(
    model: CausalLM, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    for batch, hidden in hidden_states(model, prompts, completions, batch_size):
        starts = [len(prompts[i]) - 1 for i in batch]  # the state at position t predicts token t + 1
        yield batch, _predicting(hidden, starts, [len(completions[i]) for i in batch])


def _predicting(hidden: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The states that predict completion tokens, (K, d) over all rows of hidden (B, T, d)."""
    return torch.cat([hidden[i, start : start + n] for i, (start, n) in enumerate(zip(starts, lengths, strict=True))])


def _token_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Exact KL of each row's next-token distribution, (K,) float64 nats, from logits (K, V)."""
    logp, logq = torch.log_softmax(logits, -1), torch.log_softmax(reference.to(logits.device), -1)
    # Never negative, but for rounding, which is seen where the distributions are nearly equal.
    return (logp.exp() * (logp - logq)).sum(-1).double().clamp_min(0)


def settings_of(config: DistributionConfig, ranks: Ranks = ALONE) -> MeasureSettings:
    """The part of a command's configuration that decides how completions are drawn, and the processes that share it."""
    sampling = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature, n=config.n)
    return MeasureSettings(sampling, config.batch_size, config.seed, ranks=ranks)


def scores_of(config: DistributionConfig, chat: ChatFormat) -> list[Score]:
    """The reward and, where `judge_fn` is given, the second score."""
    scores = [reward_score(config, chat, config.batch_size)]
    if config.judge_fn is not None:
        scores.append(function_score(config.judge_fn, "--judge-fn", "judge", seconds=config.reward_timeout))
    return scores


def run_eval(config: EvalConfig, progress: Progress = SILENT) -> JsonObject:
    """Measure one policy. Writes nothing; returns flat columns and sample completions, on every process of a job."""
    quiet_libraries()
    with together(config) as ranks:
        return _measured(config, ranks, progress if ranks.is_main else SILENT)


def _measured(config: EvalConfig, ranks: Ranks, progress: Progress) -> JsonObject:
    reading = Reading(config)
    rows = reading.prompts(config.prompts, config.limit)
    dtype = frozen_dtype(config.dtype)
    settled = settle_attention(
        config.attention, [config.sft, config.model, *config.reward], progress, dtype=dtype, device=default_device()
    )
    reference, tokenizer = load_policy(config.sft, dtype, attention=config.attention)
    chat = ChatFormat(tokenizer, reference.generation_config)
    rows = reading.renderable(rows, chat)
    reading.report(progress)
    scores = scores_of(config, chat)
    same = config.model.resolve() == config.sft.resolve()
    model = reference if same else load_policy(config.model, dtype, attention=config.attention)[0]
    check_same_vocabulary(model, reference, str(config.model), str(config.sft))
    note_other_temperature(config, progress)
    settings = settings_of(config, ranks)
    measured = measure(model, reference, chat, rows, scores, settings, progress, f"eval {config.model.name}")
    return {
        "model": str(config.model),
        **measured.columns(),
        "n": measured.n,
        "prompts": len(rows),
        "temperature": config.temperature,
        "max_new_tokens": config.max_new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": kernels_in(settled),
        "samples": list(measured.samples),
    }


def note_other_temperature(config: EvalConfig, progress: Progress) -> None:
    """Say that a policy was trained at another temperature: figures of its run and of its front are not these."""
    trained = ((read_manifest(config.model) or {}).get("config") or {}).get("temperature")
    if isinstance(trained, int | float) and trained != config.temperature:
        progress.note(
            f"{config.model} was trained at temperature {trained:g} and is measured at {config.temperature:g}; "
            f"--temperature {trained:g} gives figures like those of its run"
        )


def check_same_vocabulary(model: CausalLM, reference: CausalLM, name: str, reference_name: str) -> None:
    """A KL needs one vocabulary. Raises InputError with both sizes."""
    sizes = int(model.config.vocab_size), int(reference.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise InputError(
            f"{name} has a vocabulary of {sizes[0]}, the SFT policy {reference_name} one of {sizes[1]}",
            "compare policies of one family",
        )
