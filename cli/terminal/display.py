"""Layout of bars and tables on a terminal. Imported only if there is one: rich costs start-up time."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
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
from rich.table import Column, Table
from rich.text import Text

__all__ = ["progress_display", "rich_table"]


class _Amount(ProgressColumn):
    """The amount done, the total and the rate, in the unit of the task."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields.get("unit", ""))
        if unit == "bytes":
            total = task.total or 0
            scale, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
            rate = f"{task.speed / 1e6:.0f} MB/s" if task.speed else "-"
            return Text(f"{task.completed / scale:.2f}/{total / scale:.2f} {name}  {rate}", style="cyan")
        done = MofNCompleteColumn().render(task).plain.strip() if task.total else f"{task.completed:,.0f}"
        rate = f"  {task.speed:,.1f} {unit}/s" if task.speed else f" {unit}"
        return Text(done + rate, style="cyan")


NARROW_DISPLAY = 80  # columns of a terminal


class _State(SpinnerColumn):
    """A spinner while a task runs, then a mark: done, or ended by an error."""

    def render(self, task: Task) -> RenderableType:
        return Text("✗", style="red") if task.fields.get("failed") else super().render(task)


def progress_display(console: Console) -> Progress:
    """The live display of all running tasks: a line each, on a narrow terminal with a short bar and less next to it."""
    narrow = console.width < NARROW_DISPLAY
    return Progress(
        _State(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=6 if narrow else 24),
        _Amount(table_column=Column(no_wrap=True)),
        *([] if narrow else [TimeElapsedColumn(table_column=Column(no_wrap=True))]),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[live]}", table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=8,
    )


def rich_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout that fits the terminal and shows every cell whole.

    Where the columns do not fit next to each other, they follow in blocks, each with the first column.
    """
    console = Console()
    headers = [column.replace("_", " ") for column in columns]
    widths, border = _widths(headers, cells, console.width)
    for number, block in enumerate(_blocks(widths, border, console.width)):
        table = Table(
            title=title if title and number == 0 else None,
            title_justify="left",
            header_style="bold",
            box=box.HEAVY_HEAD if border == WITH_LINES else box.SIMPLE_HEAD,
            show_edge=border == WITH_LINES,
            padding=(0, 1) if border == WITH_LINES else (0, 1, 0, 0),
        )
        for index in block:
            left = index == 0 or not _are_numbers(cells, index)
            # Text is wrapped; figures are not, and are never cut.
            table.add_column(headers[index], justify="left" if left else "right", width=widths[index], overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[index]) for index in block))
        if number:
            console.print()
        console.print(table)


WITH_LINES, WITH_BLANKS = 3, 2  # characters next to each column
NARROW = 18  # columns of a text that shares a narrow terminal with figures


def _are_numbers(cells: Sequence[Sequence[str]], index: int) -> bool:
    """Whether no cell of a column is wider than a figure: such a cell must not be wrapped."""
    return all(len(row[index]) <= NARROW and not row[index][:1].isalpha() for row in cells)


def _widths(headers: Sequence[str], cells: Sequence[Sequence[str]], limit: int) -> tuple[list[int], int]:
    """The width of every column, and the characters next to each: as wide as they need, else as narrow as they can."""
    longest = [max((len(row[i]) for row in cells), default=0) for i in range(len(headers))]
    whole = [max(length, len(header)) for length, header in zip(longest, headers, strict=True)]
    folded = [max(n, *map(len, header.split() or [""])) for n, header in zip(longest, headers, strict=True)]
    for widths, border in ((whole, WITH_LINES), (folded, WITH_LINES), (folded, WITH_BLANKS)):
        if sum(widths) + border * len(widths) + 1 <= limit:
            return widths, border
    texts = {i for i in range(len(headers)) if not _are_numbers(cells, i)}
    narrow = [min(width, NARROW) if i in texts else width for i, width in enumerate(folded)]
    spare = limit - 1 - sum(narrow) - WITH_BLANKS * len(narrow)
    for i in sorted(texts, key=folded.__getitem__):  # what is left goes to texts, the shortest first
        more = min(max(spare, 0), folded[i] - narrow[i])
        narrow[i], spare = narrow[i] + more, spare - more
    return [min(width, limit - WITH_BLANKS) for width in narrow], WITH_BLANKS


def _blocks(widths: Sequence[int], border: int, limit: int) -> list[list[int]]:
    """The columns of every block, from left to right; each block begins with the first column."""
    blocks: list[list[int]] = []
    used = limit + 1
    for index, width in enumerate(widths):
        if (index and used + width + border > limit) or not blocks:
            blocks.append([0] if index else [])
            used = 1 + (widths[0] + border if index else 0)
        blocks[-1].append(index)
        used += width + border
    return blocks
