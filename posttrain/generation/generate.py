"""Teacher completions for prompts (Gemma 2 report, section 4: responses mostly from a larger teacher).

    data-00000-of-0000N.jsonl   one model turn:      {"prompt": MESSAGES, "completion": MESSAGES, ...}
                                several (--turns):   {"messages": MESSAGES, "turns": model turns, ...}

and in every row, before the prompt row's other columns:

    finish_reason   "stop", or "length" where the last model turn was cut (kept only with keep_truncated)
    tokens          of the model turns, stop tokens included; null where a server does not count
    prompt_tokens   of the first request
    logprob         nats, sum over the model turns: of the sampler at the sampling temperature, of vLLM and servers as
                    they report it; null where they do not
    sample, seed    number among the n of its prompt, and the seed that it was drawn with
    teacher, temperature, top_p, top_k, min_p
    reward          with reward models or functions: their sum for the last model turn

Rows are in the order of the prompts, then of the samples, whatever the engine and the order of its answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2.core.errors import GuardStop
from gemma2.core.json_files import JsonObject
from gemma2.core.progress import SILENT, Progress
from gemma2.posttrain.data.sources import ShardWriter
from gemma2.posttrain.rewards.functions import load_function
from gemma2.posttrain.runs.generation_budget import source_of
from gemma2.posttrain.runs.inputs import model_name
from gemma2.posttrain.runs.run_directory import Run, RunOptions, RunResult, open_run
from gemma2.posttrain.runs.together import together
from gemma2.posttrain.schemas import GenerateConfig

from .answers import Answering
from .dialogues import EMPTY, Dialogue, DialoguePlan
from .engines import load_engine
from .engines.base import LENGTH, OVERLONG, STOP
from .journal import journal_of
from .scoring import Scored, scored

if TYPE_CHECKING:
    from gemma2.posttrain.data.chat import ChatFormat

__all__ = ["run_generate"]

TRAINING_COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected")  # a row holds one example
# The fix where no answer is left, by the most frequent reason.
ADVICE = {
    LENGTH: "raise --max-new-tokens",
    EMPTY: "raise --max-new-tokens for a teacher that thinks first, or look at --stop",
    OVERLONG: "shorten the prompts, or lower --max-new-tokens",
    "tool_calls": "set --set request.tool_choice=none",
    "content_filter": "use other prompts or another teacher",
    "refused": "use other prompts or another teacher",
    "malformed": "check --base-url",
}
MOST_NAMES = 20  # models and addresses in the summary: a server may have another one for every answer


def run_generate(config: GenerateConfig, options: RunOptions, progress: Progress = SILENT) -> RunResult:
    """Let `config.teacher` answer `config.prompts`; rows in shards in `options.out`.

    Raises InputError for unusable prompts or models, or a server that refuses; GuardStop when nothing is left to keep.
    """
    _quiet(config)
    for name in config.reward_fn:
        load_function(name, "--reward-fn")  # a misspelt name shows before anything is drawn
    plan = DialoguePlan(config.n, config.seed, config.turns, config.user_instruction)
    with together(config) as ranks, open_run("generate", config, options, ranks=ranks) as run:
        progress = progress if ranks.is_main else SILENT
        with journal_of(run, "answers.jsonl") as journal:
            with closing(load_engine(config, progress, ranks)) as engine:
                ids = bool(config.reward)
                source = source_of(config)
                answering = Answering(source, plan, journal, engine.chunk, ids, ranks)
                prompts = answering.check(engine, progress, config.on_overlong)
                unread = source.reading.report(progress, run.path if ranks.is_main else None)
                answering.run(engine, prompts, progress)
                facts, chat = engine.facts(), engine.chat
            chunks = _judged(run, config, answering, chat, progress)
            if not ranks.is_main:
                return run.finish({"chunks": sum(1 for _ in chunks)})  # what rank 0 writes is its own
            return run.finish(_write(run.path, config, chunks, progress) | unread | facts)


def _quiet(config: GenerateConfig) -> None:
    """Quiet the libraries that load models, unless a server answers and nothing judges: torch is not imported then."""
    if config.engine != "openai" or config.reward_terms:
        from gemma2.posttrain.models.loading import quiet_libraries

        quiet_libraries()


def _settled(config: GenerateConfig, progress: Progress) -> JsonObject:
    """The attention kernel of the reward models; a teacher draws in eager attention, or in sdpa where it is asked."""
    from gemma2.posttrain.attention.choice import settle_attention
    from gemma2.posttrain.models.loading import default_device
    from gemma2.posttrain.models.precision import frozen_dtype

    dtype, device = frozen_dtype(config.dtype), default_device()
    return settle_attention(config.attention, config.reward, progress, dtype=dtype, device=device)


def _judged(
    run: Run, config: GenerateConfig, answering: Answering, chat: ChatFormat | None, progress: Progress
) -> Iterator[Scored]:
    """The chunks of answers with their scores, all None where nothing judges. The engine's memory is free by now."""
    if not config.reward_terms:
        for dialogues in answering.dialogues() if run.ranks.is_main else ():
            yield [(dialogue, None) for dialogue in dialogues]
        return
    from gemma2.posttrain.rewards.terms import reward_score

    if config.reward:
        run.origin["attention"] = _settled(config, progress)
    if chat is None and config.reward:
        from gemma2.posttrain.data.chat import ChatFormat
        from gemma2.posttrain.models.loading import load_tokenizer

        chat = ChatFormat(load_tokenizer(config.reward[0]))
    score = reward_score(config, chat, config.batch_size)  # type: ignore[arg-type]  # read with a reward model only
    with journal_of(run, "scores.jsonl") as journal:
        yield from scored(answering, journal, score, chat, lambda dialogue: _kept(dialogue, config), progress)


def _kept(dialogue: Dialogue, config: GenerateConfig) -> bool:
    return bool(dialogue.answers) and (dialogue.fate == STOP or config.keep_truncated)


def _write(out: Path, config: GenerateConfig, chunks: Iterator[Scored], progress: Progress) -> JsonObject:
    """Write the shards; the summary."""
    count, sent = Counter[str](), Sent()
    rewards: list[float] = [0.0, 0.0]  # sums over all that were judged, and over the kept
    teacher = teacher_name(config)
    with ShardWriter(out, config.shard_rows) as shards:
        for chunk in chunks:
            for _, group in groupby(chunk, key=lambda pair: pair[0].row):
                samples = list(group)
                kept = [(d, value) for d, value in samples if _kept(d, config)]
                for dialogue, value in _best(kept, config.best):
                    shards.write(_row(dialogue, config, teacher, value))
                    _count_row(count, dialogue)
                    rewards[1] += value or 0.0
                _count_samples(count, sent, samples, config)
                rewards[0] += sum(value for _, value in kept if value is not None)
                count["judged"] += sum(value is not None for _, value in kept)
    _guard(count, sent.dropped, config, progress)
    return _summary(count, rewards, config) | sent.summary()


def _best(samples: Scored, best: int | None) -> Scored:
    """The `best` highest scores, in the order in which they were drawn; of equal ones the earlier."""
    if best is None:
        return samples
    ranked = sorted(samples, key=lambda pair: -(pair[1] or 0.0))[:best]
    return sorted(ranked, key=lambda pair: pair[0].sample)


def _row(dialogue: Dialogue, config: GenerateConfig, teacher: str, reward: float | None) -> JsonObject:
    answers = dialogue.answers
    logprobs = [answer.logprob for answer in answers if answer.logprob is not None]
    ours: JsonObject = {"messages": dialogue.messages, "turns": len(answers)}
    if config.turns == 1:
        completion = {"role": "assistant", "content": answers[0].text}
        ours = {"prompt": dialogue.prompt.messages, "completion": [completion]}
    ours |= {
        "finish_reason": dialogue.fate,
        "tokens": _total(answer.tokens for answer in answers),
        "prompt_tokens": answers[0].prompt_tokens,
        "logprob": round(sum(logprobs), 4) if len(logprobs) == len(answers) else None,
        "sample": dialogue.sample,
        "teacher": teacher,
        "seed": dialogue.seed,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
    }
    if reward is not None:
        ours["reward"] = round(reward, 6)
    theirs = dialogue.prompt.extra.items()
    return ours | {name: value for name, value in theirs if name not in ours and name not in TRAINING_COLUMNS}


def _total(counts: Iterator[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def teacher_name(config: GenerateConfig) -> str:
    """The teacher's name in the rows: the model's name at a server, its hub id, or the name of its directory."""
    return str(config.teacher) if config.engine == "openai" else model_name(config.teacher)


def _count_row(count: Counter[str], dialogue: Dialogue) -> None:
    count["rows"] += 1
    count["tokens"] += sum(answer.tokens or 0 for answer in dialogue.answers)
    count["shortened"] += len(dialogue.answers) < dialogue.plan.turns and dialogue.fate == STOP


@dataclass
class Sent:
    """The reasons of dropped answers, and the server's words about them. The names are the server's."""

    dropped: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    redirects: Counter[str] = field(default_factory=Counter)

    def summary(self) -> JsonObject:
        """The figures that occurred, the most frequent names of each."""
        named = {"dropped": self.dropped, "models_used": self.models, "redirected_to": self.redirects}
        return {name: dict(figures.most_common(MOST_NAMES)) for name, figures in named.items() if figures}


def _count_samples(count: Counter[str], sent: Sent, samples: Scored, config: GenerateConfig) -> None:
    count["prompts"] += 1
    for dialogue, _ in samples:
        count["completions"] += 1
        count["truncated"] += dialogue.fate == LENGTH
        if dialogue.fate not in (STOP, LENGTH):
            sent.dropped[dialogue.fate] += 1
        elif config.keep_truncated and not dialogue.answers:
            sent.dropped[EMPTY] += 1
        sent.models.update(turn.model for turn in dialogue.drawn if turn.model is not None)
        sent.redirects.update(turn.redirect for turn in dialogue.drawn if turn.redirect is not None)
        count["asked"] += sum(turn.prompt_tokens or 0 for turn in dialogue.drawn)
        count["answered"] += sum(turn.tokens or 0 for turn in dialogue.drawn)


def _guard(count: Counter[str], dropped: Counter[str], config: GenerateConfig, progress: Progress) -> None:
    """Stop when there is nothing to learn from, warn when most of the answers were cut or dropped."""
    total, limit = count["completions"], f"--max-new-tokens {config.max_new_tokens}"
    if not count["rows"] and count["truncated"] == total and not config.keep_truncated:
        raise GuardStop(
            f"all {total} completions ran into {limit}",
            "raise it, or keep them with --keep-truncated, and start over with --force",
        )
    cut = {} if config.keep_truncated else {"truncated": count["truncated"]}
    reasons = ", ".join(f"{figure} {name}" for name, figure in (Counter(cut) + dropped).most_common(MOST_NAMES))
    if not count["rows"]:
        (common, _), *_ = dropped.most_common(1) or [(LENGTH, 0)]
        hint = ADVICE.get(common, f"use a teacher that ends its answers with {STOP!r}")
        raise GuardStop(f"none of {total} completions can be kept ({reasons})", f"{hint}, and start over with --force")
    if 2 * count["truncated"] > total:
        progress.warn(
            f"{count['truncated']} of {total} completions ran into {limit}; raise it to keep more of the data"
        )
    if dropped:
        progress.warn(f"{dropped.total()} of {total} completions are dropped ({reasons}); see docs/generate.md")


def _summary(count: Counter[str], rewards: list[float], config: GenerateConfig) -> JsonObject:
    """Figures of the job. Figures that did not occur or are unknown are left out, except truncated ones."""
    summary: JsonObject = {
        "prompts": count["prompts"],
        "completions": count["completions"],
        "rows": count["rows"],
        "truncated": count["truncated"],
        "mean_tokens": round(count["tokens"] / count["rows"], 2),
        "prompt_tokens": count["asked"],
        "drawn_tokens": count["answered"],
    }
    if count["shortened"]:
        summary["shortened"] = count["shortened"]
    if count["judged"]:
        summary["mean_reward"] = round(rewards[0] / count["judged"], 4)
    if config.best is not None:
        summary["mean_reward_of_best"] = round(rewards[1] / count["rows"], 4)
    if config.price_in is not None and config.price_out is not None:
        cost = (count["asked"] * config.price_in + count["answered"] * config.price_out) / 1e6
        summary["cost_usd"] = round(cost, 4)
    return summary
