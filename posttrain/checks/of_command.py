"""All checks of one command, the cheap ones first: before its dry run, its real run, and for every stage of a pipeline.

torch is not imported, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.planning.estimates import Sources
from gemma2.posttrain.runs.inputs import check_inputs
from gemma2.posttrain.schemas import FilterConfig
from gemma2.posttrain.schemas.config import Config
from gemma2.posttrain.training.tracking import check_tracking
from gemma2.posttrain.training.trainer_options import check_trainer_options

from .context import check_context
from .data_rows import RowsFound, RowsToRead, read_rows, rows_to_read
from .front_checks import check_fronts
from .kinds import Input, check_kinds
from .tokenizers import chat_of, check_tokenizers
from .user_functions import check_function, functions_of

__all__ = ["CommandChecks"]


class CommandChecks:
    """The checks of one command, or of the stages of one pipeline, which share what was read.

    sources   what earlier stages promise; the counts and lengths of the rows are added to it
    isolated  import reward functions in a child process, so that nothing of the user's code stays in this one
    """

    def __init__(self, sources: Sources | None = None, isolated: bool = True) -> None:
        self.sources = Sources() if sources is None else sources
        self.isolated = isolated
        self._read: dict[RowsToRead, RowsFound] = {}
        self._imported: set[str] = set()

    def of(self, config: Config) -> list[RowsFound]:
        """Check everything of one command; what its data sets hold.

        Raises InputError or UsageError for the first thing that would stop the command later.
        """
        return self.contents(config, self.inputs(config))

    def inputs(self, config: Config) -> list[Input]:
        """Check what headers and names tell of a command; return its models that belong together."""
        check_inputs(config, self.sources.places)
        if isinstance(config, FilterConfig):
            from gemma2.posttrain.filters.rules import check_settings  # with numpy, which no other command needs here

            check_settings(config)
        models = check_kinds(config, self.sources.promised)
        check_fronts(config, self.sources.promised)
        check_trainer_options(config)
        check_tracking(getattr(config, "report_to", ()))
        check_tokenizers(config, models)
        check_context(config)
        return models

    def contents(self, config: Config, models: Sequence[Input]) -> list[RowsFound]:
        """Import the functions of a command and read rows of its data sets that are on disk."""
        for option, name in functions_of(config):
            if name not in self._imported:
                check_function(option, name, self.isolated)
                self._imported.add(name)
        tokenizers = {path: found.tokenizer for _, path, found in models if found.tokenizer is not None}

        def chat(path: Path) -> ChatFormat | None:
            place = tokenizers.get(path, path)
            return chat_of(place) if place.is_dir() else None

        sizes = {path: found.vocabulary for _, path, found in models}
        return [
            self._rows(task, chat, sizes.get(task.model) if task.model else None)
            for task in rows_to_read(config)
            if self.sources.promise(task.path) is None
        ]

    def _rows(self, task: RowsToRead, chat: Callable[[Path], ChatFormat | None], vocabulary: int | None) -> RowsFound:
        if task not in self._read:
            self._read[task] = found = read_rows(task, chat, vocabulary)
            self.sources.counted[found.path] = found.rows
            if found.lengths:
                self.sources.tokens[found.path] = found.mean
        return self._read[task]
