"""Layout of bars and tables on a terminal. Imported only if there is one: rich costs start-up time."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gemma2.core.sizes import size

__all__ = ["progress_display", "rich_table"]


class _Amount(ProgressColumn):
    """The amount done, the total and the rate, in the unit of the task."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields.get("unit", ""))
        if unit == "bytes":
            rate = f"{size(task.speed)}/s" if task.speed else "-"
            return Text(f"{size(task.completed)} of {size(task.total or 0)}  {rate}", style="cyan")
        done = MofNCompleteColumn().render(task).plain.strip() if task.total else f"{task.completed:,.0f}"
        rate = f"  {task.speed:,.1f} {unit}/s" if task.speed else f" {unit}"
        return Text(done + rate, style="cyan")


def progress_display(console: Console) -> Progress:
    """The live display of all running tasks."""
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        _Amount(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[live]}"),
        console=console,
        refresh_per_second=8,
    )


def rich_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column.replace("_", " "), justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*row)
    Console().print(table)
