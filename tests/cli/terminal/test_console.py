"""Results alone on stdout; progress on stderr: plain lines in a pipe, bars on a terminal, nothing if quiet."""

import io
import json
import random
import re
import sys

import pytest

from gemma2.cli.terminal import console as module
from gemma2.cli.terminal import display
from gemma2.cli.terminal.console import Console
from gemma2.core.interrupts import Interrupted

ESCAPE = "\033"
SPINNER = "\u280b\u2819\u2839\u2838\u283c\u2834\u2826\u2827\u2807\u280f"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Call it in the test: stdout and stderr become terminals of 200 columns, and are returned."""

    def attach():
        streams = Terminal(), Terminal()
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        return streams

    return attach


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


# --- results ----------------------------------------------------------------------------------------------------------


def test_a_row_without_a_value_is_left_out_for_people_and_not_for_programs(capsys):
    document = {"notes": [], "rows": 0, "flat": False, "name": "", "by": {}, "best": None, "loss": 0.5}
    Console(as_json=False, quiet=True).result(document)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["rows", "0"],
        ["flat", "no"],
        ["loss", "0.5"],
    ]
    Console(as_json=True, quiet=True).result(document)
    assert json.loads(capsys.readouterr().out) == document


def test_a_result_for_people_is_two_columns(capsys):
    Console().result(
        {
            "final_loss": 0.123456,
            "steps": 12345,
            "kept": True,
            "absent": None,
            "by": {"a": 1, "b": 2.5},
            "list": [1, 2],
        },
    )
    assert capsys.readouterr().out.splitlines() == [
        "final loss  0.1235",
        "steps       12,345",
        "kept        yes",
        "by          a 1  b 2.5",
        "list        1 2",
    ]


def test_json_is_one_document_with_every_digit_and_nothing_else_on_stdout(tmp_path, capsys):
    console = Console(as_json=True)
    with console.task("SFT", total=1, unit="steps") as task:
        task.advance(1, loss=0.5)
    console.note("a note")
    console.warn("a warning")
    console.heading("a heading")
    document = {"loss": 0.123456789, "none": None, "nested": {"path": tmp_path, "text": "ünï"}, "tuple": (1, 2)}
    console.result(document, tmp_path / "out")
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "out": str(tmp_path / "out"),
        "loss": 0.123456789,
        "none": None,
        "nested": {"path": str(tmp_path), "text": "ünï"},
        "tuple": [1, 2],
    }
    assert "a note" in err


def test_json_stays_json_when_a_figure_is_not_finite(capsys):
    Console(as_json=True).result({"a": float("nan"), "b": [float("inf")], "c": {"d": -float("inf"), "e": 1.5}})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [None],
        "c": {"d": None, "e": 1.5},
    }


def test_a_table_in_a_pipe_is_aligned_text(capsys):
    Console().table([{"name": "sft", "reward": 0.5}, {"name": "warp 2", "kl": 1.25}], "Title")
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name    reward  kl",
        "sft     0.5     -",
        "warp 2  -       1.25",
    ]


def test_an_empty_table_is_not_an_error(capsys):
    Console().table([])
    assert capsys.readouterr().out.strip() == ""


def test_a_table_on_a_terminal_holds_the_same_cells(terminal):
    out, _err = terminal()
    Console().table([{"name": "sft", "best_reward": 0.5}], "Title")
    text = out.getvalue()
    for part in ("Title", "name", "best reward", "sft", "0.5"):
        assert part in text


# --- progress in a pipe -----------------------------------------------------------------------------------------------


def test_progress_in_a_pipe_is_one_line_per_interval(capsys, clock):
    console = Console()
    with console.task("SFT", total=100, unit="steps") as task:
        for _ in range(4):
            clock[0] += 10
            task.advance(10, loss=0.51234)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "SFT: 20 of 100 steps in 20 s, loss 0.5123",
        "SFT: 40 of 100 steps in 40 s, loss 0.5123",
        "SFT: 40 of 100 steps in 40 s, loss 0.5123",
    ]


def test_a_task_that_ends_at_once_prints_no_line(capsys, clock):
    with Console().task("SFT", total=1, unit="steps") as task:
        task.advance(1)
    assert capsys.readouterr().err == ""


def test_bytes_are_printed_with_their_unit(capsys, clock):
    with Console().task("merge", total=5e9, unit="bytes") as task:
        clock[0] += 20
        task.advance(1_234_000_000)
    assert capsys.readouterr().err.startswith("merge: 1.23 GB of 5.00 GB")


def test_a_task_without_a_total_counts_up(capsys, clock):
    with Console().task("read", total=None, unit="rows") as task:
        clock[0] += 20
        task.advance(7)
    assert capsys.readouterr().err.startswith("read: 7 rows in 20 s")


def test_quiet_leaves_warnings_only(capsys, clock):
    console = Console(quiet=True)
    with console.task("SFT", total=1, unit="steps") as task:
        clock[0] += 100
        task.advance(1)
    console.note("a note")
    console.heading("a heading")
    console.warn("this matters")
    assert capsys.readouterr() == ("", "warning: this matters\n")


def test_nothing_in_a_pipe_has_ansi_codes(capsys, clock):
    console = Console()
    with console.task("SFT", total=2, unit="steps") as task:
        clock[0] += 20
        task.advance(1, loss=0.5)
        console.note("[bold]note[/]")
        console.warn("warning")
        console.heading("heading")
    console.result({"a": 1})
    console.table([{"a": 1}], "title")
    out, err = capsys.readouterr()
    assert ESCAPE not in out + err
    assert "[bold]note[/]\n" in err, "text is not markup"


# --- progress on a terminal -------------------------------------------------------------------------------------------


def test_bars_of_nested_tasks_share_one_display_with_live_figures(terminal, monkeypatch):
    out, err = terminal()
    opened = []
    make = display.progress_display
    monkeypatch.setattr(display, "progress_display", lambda console: opened.append(make(console)) or opened[-1])
    console = Console()
    with console.task("WARP", total=2, unit="runs") as outer:
        with console.task("RL", total=10, unit="steps") as inner:
            inner.advance(4, reward=1.25)
            console.note("[a note] between")
            opened[0].refresh()
        assert len(opened[0].tasks) == 1  # the row of an inner task goes with it
        outer.advance(1)
    assert len(opened) == 1
    assert out.getvalue() == ""
    assert ESCAPE in err.getvalue()
    for part in ("WARP", "RL", "4/10", "reward", "1.25", "[a note] between"):
        assert part in err.getvalue(), part


def test_inner_tasks_end_in_any_order(terminal):
    _out, err = terminal()
    console = Console()
    with console.task("pipeline", total=2, unit="stages"):
        first, second = (console.task(name, total=1, unit="steps") for name in ("first", "second"))
        first.__enter__()
        bar = second.__enter__()
        first.__exit__(None, None, None)
        bar.advance(1)
        console.note("the first has ended")
        second.__exit__(None, None, None)
    assert "the first has ended" in err.getvalue()
    assert err.getvalue().count(f"{ESCAPE}[?25l") == 1  # one display from beginning to end


def test_a_display_is_closed_by_an_exception_and_another_can_open(terminal):
    _out, err = terminal()
    console = Console()
    with pytest.raises(RuntimeError), console.task("first", total=1, unit="steps"):
        raise RuntimeError
    with console.task("second", total=1, unit="steps") as task:
        task.advance(1)
    assert "second" in err.getvalue()
    assert err.getvalue().count(f"{ESCAPE}[?25l") == err.getvalue().count(f"{ESCAPE}[?25h")


def test_quiet_shows_no_bar_on_a_terminal_either(terminal):
    _out, err = terminal()
    with Console(quiet=True).task("SFT", total=1, unit="steps") as task:
        task.advance(1)
    assert err.getvalue() == ""


def test_headings_on_a_terminal_are_bold_and_not_markup(terminal):
    _out, err = terminal()
    Console().heading("[1/6] Embedded models")
    assert "[1/6] Embedded models" in err.getvalue()
    assert f"{ESCAPE}[1m" in err.getvalue()


# --- bars and tables, whatever happens --------------------------------------------------------------------------------


def last_row(err):
    lines = [re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", err.getvalue())]
    return [line for line in lines if line.strip()][-1]


@pytest.mark.parametrize("total", [None, 0, 1, 7, 1000])
@pytest.mark.parametrize("done", [0, 1, 7])
@pytest.mark.parametrize("unit", ["steps", "bytes"])
def test_a_bar_ends_full_however_much_was_done(terminal, total, done, unit):
    _out, err = terminal()
    with Console().task("work", total, unit) as task:
        for _ in range(done):
            task.advance(1, loss=0.5)
    row = last_row(err)
    assert "\u2713" in row
    assert "\u2578" not in row  # half a block
    assert not set(row) & set(SPINNER)
    full = re.search("\u2501+", row)
    assert full is not None
    assert len(full[0]) == 24
    assert f"{done}/{done} " in row or unit == "bytes" or not done


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted, SystemExit])
def test_a_bar_that_an_error_ends_has_a_mark_and_no_spinner(terminal, error):
    _out, err = terminal()
    with pytest.raises(error), Console().task("work", 10, "steps") as task:
        task.advance(4)
        raise error
    row = last_row(err)
    assert "\u2717" in row
    assert "4/10" in row
    assert not set(row) & set(SPINNER)


def test_an_error_inside_an_inner_bar_ends_both(terminal):
    _out, err = terminal()
    console = Console()
    with pytest.raises(ValueError), console.task("outer", 2, "steps"), console.task("inner", 2, "steps"):
        raise ValueError
    assert "\u2717" in last_row(err)
    assert console._display is None


WORDS = (
    "model.layers.10",
    "warp/iteration-1/policy-2",
    "the reward is NaN; check the model",
    "x",
    "",
    "1,234,567",
    "-",
)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("seed", range(8))
def test_a_table_fits_the_terminal_and_loses_nothing(terminal, monkeypatch, width, seed):
    out, _err = terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    draw = random.Random(seed)
    columns = [f"column {number}" for number in range(draw.randint(1, 14))]
    texts = {column: draw.random() < 0.3 for column in columns}
    rows = [
        {c: draw.choice(WORDS) if texts[c] else draw.choice([0.123456, 1e-7, 12345678, None, True]) for c in columns}
        for _ in range(draw.randint(1, 5))
    ]
    Console().table(rows, "Title")
    text = re.sub(r"\033\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert max(map(len, text.splitlines())) <= width
    inside = re.sub(r"[\s\u2500-\u257f]", "", text)
    for column in columns:
        assert column.split()[1] in inside
    for row in rows:
        for column, value in row.items():
            if not texts[column]:  # figures stand whole on one line
                assert re.search(rf"(^|[\s\u2502]){re.escape(module._value(value))}($|[\s\u2502])", text, re.MULTILINE)


def test_a_drawing_is_no_wider_than_the_terminal(terminal, monkeypatch):
    terminal()
    monkeypatch.setenv("COLUMNS", "60")
    assert Console().width(76) == 60
    monkeypatch.setenv("COLUMNS", "200")
    assert Console().width(76) == 76
