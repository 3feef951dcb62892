"""Every prompt of a data set answered by an engine, with a journal, so that a killed run goes on where it stopped.

Prompts are read as a stream and answered in chunks: turn by turn, the requests of a chunk go to the engine together,
and every completion is in the journal before the next group is drawn. Chunks follow from the configuration alone, so a
resumed run groups the same requests; answers in the journal are not asked for again. At most one chunk
is in memory, in every pass.

Of several processes rank 0 alone has the journal; at a resume it sends the others what the journal holds of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Literal

from gemma2.core.errors import InputError, UsageError
from gemma2.core.progress import Progress, Task
from gemma2.core.ranks import ALONE, Ranks
from gemma2.posttrain.data.rows import located
from gemma2.posttrain.data.sources import no_rows
from gemma2.posttrain.runs.generation_budget import PromptSource

from .dialogues import Dialogue, DialoguePlan
from .engines import Completion, Engine, Request
from .engines.base import Key
from .journal import Journal

__all__ = ["Answering"]

OnOverlong = Literal["error", "drop"]


class Answering:
    """One job: its prompts, the plan for each, the journal of the answers, and the number of requests in a chunk.

    Without `keep_ids` the journal holds no token ids; they are there for reward models that read them.
    ranks: the processes that share the answers, each with an engine that gives all of them (`SamplerEngine`).
    """

    def __init__(
        self,
        source: PromptSource,
        plan: DialoguePlan,
        journal: Journal,
        chunk: int,
        keep_ids: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.source = source
        self.plan = plan
        self.journal = journal
        self.rows = max(1, chunk // plan.n)  # prompts per chunk
        self.keep_ids = keep_ids

    def check(self, engine: Engine, progress: Progress, on_overlong: OnOverlong = "error") -> int:
        """Read and render every prompt before the first one is answered; their number.

        Raises InputError with `file:line` for a row that is not a prompt, or that the engine cannot take.
        """
        if engine.window is not None and engine.window < 1:
            raise UsageError("--max-new-tokens fills the model's context alone", "lower it")
        count = 0
        with progress.task("check", total=None, unit="prompts") as bar:
            for prompt in self.source:
                with self.source.reading.usable(prompt):
                    size = len(engine.encode(prompt.messages))
                    if engine.window is not None and size > engine.window and on_overlong == "error":
                        raise InputError(
                            f"{size} tokens, where {engine.window} and the completion fit into the model's context",
                            "shorten it, lower --max-new-tokens, or leave it out (generate: --on-overlong drop)",
                        )
                    count += 1
                bar.advance(1)
        if count == 0:
            raise no_rows(self.source.path)
        return count

    def run(self, engine: Engine, prompts: int, progress: Progress) -> None:
        """Draw the answers that are missing from the journal; `prompts` is the number of prompts."""
        each = self.plan.n * self.plan.drawn_turns
        with progress.task("generate", total=prompts * each, unit="completions") as bar:
            meter = _Meter(bar)
            saved = self._saved()
            resumed = self.ranks.on_main(lambda: self.journal.size > 0)
            for dialogues in self._chunks():
                known = self.ranks.on_main(lambda: next(saved, {})) if resumed else {}
                meter.skip(len(known))
                self._answer(engine, dialogues, known, meter)
                meter.close(len(dialogues) * self.plan.drawn_turns)

    def dialogues(self) -> Iterator[list[Dialogue]]:
        """The content of the journal of a finished job, chunk by chunk, prompt-major; on rank 0, which has it."""
        for dialogues, known in zip(self._chunks(), self._saved(), strict=True):
            for _ in range(self.plan.drawn_turns):
                for dialogue in dialogues:
                    dialogue.take(known)
            yield dialogues

    def _chunks(self) -> Iterator[list[Dialogue]]:
        numbered = enumerate(self.source)
        while rows := list(islice(numbered, self.rows)):
            yield [Dialogue(self.plan, prompt, row, k) for row, prompt in rows for k in range(self.plan.n)]

    def _saved(self) -> Iterator[dict[Key, Completion]]:
        """The completions of one chunk after the other."""
        completions = map(Completion.of_record, self.journal.records())
        for _, group in groupby(completions, key=lambda completion: completion.key[0] // self.rows):
            yield {completion.key: completion for completion in group}

    def _answer(
        self, engine: Engine, dialogues: Sequence[Dialogue], known: dict[Key, Completion], meter: _Meter
    ) -> None:
        for _ in range(self.plan.drawn_turns):
            going = [dialogue for dialogue in dialogues if not dialogue.ended]
            if any(dialogue.key not in known for dialogue in going):
                requests = self._requests(engine, going, known)
                for group in engine.complete(requests, known):
                    self._keep([completion for completion in group if completion.key not in known], known)
                    meter.add(group)
            for dialogue in going:
                dialogue.take(known)

    def _requests(self, engine: Engine, going: Sequence[Dialogue], known: dict[Key, Completion]) -> list[Request]:
        """The next turn of every dialogue, except for those that do not fit: they get the answer `overlong`."""
        requests, refused = [], []
        for dialogue in going:
            messages = dialogue.next_prompt()
            with located(dialogue.prompt.where):
                ids = engine.encode(messages)
            if engine.window is not None and len(ids) > engine.window:
                refused.append(Completion.overlong(dialogue.key, len(ids)))
            else:
                requests.append(Request(dialogue.key, dialogue.prompt.where, messages, ids, dialogue.turn_seed))
        self._keep([completion for completion in refused if completion.key not in known], known)
        return requests

    def _keep(self, completions: list[Completion], known: dict[Key, Completion]) -> None:
        kept = completions if self.keep_ids else [replace(completion, ids=[]) for completion in completions]
        self.journal.append(completion.record() for completion in kept)
        known.update({completion.key: completion for completion in kept})


class _Meter:
    """Completions on the bar, and how many tokens a second were drawn since the start."""

    def __init__(self, bar: Task) -> None:
        self.bar = bar
        self.tokens = 0
        self.started = time.monotonic()
        self.shown = 0  # of the current chunk

    def skip(self, count: int) -> None:
        """Completions that were there already."""
        self.shown += count
        self.bar.advance(count)

    def add(self, completions: Sequence[Completion]) -> None:
        """Completions that have been drawn."""
        self.tokens += sum(completion.tokens or 0 for completion in completions)
        rate = self.tokens / max(time.monotonic() - self.started, 1e-3)
        self.shown += len(completions)
        self.bar.advance(len(completions), **{"tokens/s": round(rate, 1)})

    def close(self, expected: int) -> None:
        """The end of a chunk: turns of dialogues that ended early will not come."""
        self.bar.advance(expected - self.shown)
        self.shown = 0
