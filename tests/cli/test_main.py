"""Exit codes and messages of the process itself: one line for an expected failure, a traceback for a bug."""

import errno
import os
import signal
import subprocess

import pytest
from processes import MAIN, finish, gemma2, start
from waiting import PATIENCE

from gemma2.cli import app, main
from gemma2.core.errors import GuardStop, InputError, OutputError, UsageError


@pytest.fixture
def command(monkeypatch):
    """Run `gemma2` in this process with a command that raises what the test gives."""

    def run_with(error):
        def invoke(arguments):
            raise error

        monkeypatch.setattr(app, "invoke", invoke)
        return main.run([])

    return run_with


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("model x is not a directory", "give one"), 1),
        (OutputError("out exists", "give one"), 1),
        (UsageError("unknown key 'a'", "give one"), 2),
        (GuardStop("the KL is 201", "give one"), 3),
    ],
)
def test_an_expected_failure_is_one_line_and_has_its_own_exit_code(command, capsys, error, code):
    assert command(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {error.what}; give one\n"


def test_a_message_of_several_lines_is_printed_as_one(command, capsys):
    assert command(InputError("first\n  second", "fix\nit")) == 1
    assert capsys.readouterr().err == "error: first second; fix it\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_refusal_of_the_operating_system_is_one_line(command, capsys, number):
    assert command(OSError(number, os.strerror(number), "/some/file")) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(number)}: /some/file; check its place and permissions\n"


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), KeyError("k"), OSError(errno.EIO, "Input/output error")])
def test_a_bug_is_not_reported_as_an_expected_error(command, bug):
    with pytest.raises(type(bug)):
        command(bug)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["sfft"], "No such command 'sfft'. Did you mean 'sft'? (see gemma2 --help)"),
        (["sft", "--modle", "x"], "No such option: --modle (Possible options: --model) (see gemma2 sft --help)"),
        (["sft", "--epochs", "many"], "--epochs many is not a number; give a number"),
        (["sft", "stray"], "unexpected extra argument"),
        (["sft", "--model"], "Option '--model' requires an argument"),
        (["reward", "pears"], "No such command 'pears'. Did you mean 'pairs'? (see gemma2 reward --help)"),
        (["sft", "--end-of-turn", "never"], "--end-of-turn never is not one of eot, eot+eos"),
    ],
)
def test_a_command_line_that_cannot_be_parsed_is_one_line_with_a_suggestion(capsys, line, said):
    assert main.run(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


# --- processes --------------------------------------------------------------------------------------------------------

# A stage that works until it gets a signal; it replaces the real stage, which takes seconds to import.
WORKING = """
import sys, time, types
from gemma2.posttrain.runs.run_directory import open_run
def run_sft(config, options, progress):
    with open_run("sft", config, options) as run:
        if sys.argv[-1].endswith("keep"):
            (run.checkpoints / "checkpoint-1").mkdir(parents=True)
        print("ready", flush=True)
        BODY
from gemma2.posttrain.runs import inputs
inputs.check_inputs = lambda config: None
sys.modules["gemma2.posttrain.sft.sft"] = types.SimpleNamespace(run_sft=run_sft)
"""
SLEEP = "time.sleep(3600)"
# Libraries turn an exception of any kind into an ImportError.
IMPORTING = "\n        ".join(
    ["try:", "    time.sleep(3600)", "except BaseException:", "    raise ImportError('the C extensions failed')"]
)
CLEANING = "\n        ".join(
    [
        "from gemma2.core import interrupts",
        "interrupts.ECHO = 60",  # seconds in which signals count as one
        "try:",
        "    print('inside', flush=True)",
        "    time.sleep(3600)",
        "finally:",
        "    print('cleaning', flush=True)",
        "    sys.stdin.readline()",
    ]
)
WAITING = "sys.stdin.readline(); run.finish({}); return run.result"


def working(out, body=SLEEP, **options):
    script = WORKING.replace("BODY", body) + MAIN
    process = start(script, "sft", "--model", "m", "--data", "d", "--out", out, **options)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("body", "number", "code"),
    [
        (SLEEP, signal.SIGINT, 130),
        (SLEEP, signal.SIGTERM, 143),
        (SLEEP, signal.SIGHUP, 129),
        (IMPORTING, signal.SIGINT, 130),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP", "SIGINT while importing"],
)
def test_a_signal_ends_the_run_without_a_traceback_and_leaves_nothing(tmp_path, body, number, code):
    process = working(tmp_path / "out", body)
    process.send_signal(number)
    assert finish(process) == (code, "", "\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_with_a_checkpoint_is_kept_for_resume(tmp_path):
    process = working(tmp_path / "keep")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (143, "", "work done so far is kept: continue with --resume\n\ninterrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == [".keep.partial"]


def test_a_second_signal_does_not_cut_the_cleanup_short(tmp_path):
    process = working(tmp_path / "out", CLEANING, stdin=subprocess.PIPE)
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (130, "", "\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_run_under_nohup_outlives_the_terminal(tmp_path):
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = working(tmp_path / "out", WAITING, stdin=subprocess.PIPE, **ignore)
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 0
    assert (tmp_path / "out" / "gemma2.json").exists()


def test_a_bug_keeps_its_traceback(tmp_path):
    process = working(tmp_path / "out", "raise ZeroDivisionError('here')")
    code, _, err = finish(process)
    assert code == 1
    assert err.startswith("Traceback")
    assert "ZeroDivisionError: here" in err
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_real_process_is_one_line_and_touches_nothing(tmp_path):
    code, out, err = gemma2("sft", "--model", tmp_path / "gone", "--data", tmp_path / "d", "--out", tmp_path / "o")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_closes_the_pipe_early_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    process = start(MAIN, "warp", "--help", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")


def test_a_reader_of_the_progress_that_closes_the_pipe_does_not_stop_the_work(tmp_path):
    read, write = os.pipe()
    body = f"sys.stdin.readline(); progress.warn('a line'); progress.warn('another'); {WAITING}"
    process = working(tmp_path / "out", body, stderr=write, stdin=subprocess.PIPE)
    os.close(read)
    os.close(write)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert (tmp_path / "out" / "gemma2.json").exists()
