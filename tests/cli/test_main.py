"""Exit codes and messages of the process itself: one line for an expected failure, a traceback for a bug."""

import errno
import io
import json
import os
import signal
import subprocess

import pytest
from commands import all_commands
from processes import MAIN, finish, gemma2, start
from waiting import PATIENCE

from gemma2.cli import app, main
from gemma2.core.errors import EndedElsewhere, GuardStop, InputError, OutputError, PeerLost, UsageError
from gemma2.core.ranks import FOLDER, ProcessBug, last_words, make_room


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


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space, then start the command again"),
        (errno.EDQUOT, "free some space, then start the command again"),
        (errno.EACCES, "check its place and permissions"),
        (errno.EROFS, "choose a place that can be written"),
        (errno.ENAMETOOLONG, "choose a shorter path"),
    ],
)
def test_a_refusal_of_the_operating_system_is_one_line_with_what_to_do_about_it(command, capsys, number, hint):
    assert command(OSError(number, os.strerror(number), "/some/file")) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(number)}: /some/file; {hint}\n"


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), KeyError("k"), OSError(errno.EBADF, "Input/output error")])
def test_a_bug_is_not_reported_as_an_expected_error(command, bug):
    with pytest.raises(type(bug)):
        command(bug)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["sfft"], "No such command 'sfft'. Did you mean 'sft'? (see gemma2 --help)"),
        (["sft", "--modle", "x"], "no such option: --modle; did you mean '--model'?"),
        (["sft", "--epochs", "many"], "--epochs many is not a number; give a number"),
        (["sft", "stray"], "unexpected extra argument"),
        (["sft", "--model"], "--model needs a value; write --model VALUE; gemma2 sft --help describes it"),
        (["eval", "m", "--qa"], "--qa needs a value; write --qa VALUE; gemma2 eval --help describes it"),
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


# --- --json -----------------------------------------------------------------------------------------------------------


def error_object(out):
    document = json.loads(out)
    assert document.keys() == {"error"}
    assert document["error"].keys() == {"kind", "what", "where", "fix", "exit_code"}
    return document["error"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("model x is not a directory", "give one"), "input"),
        (OutputError("out exists", "give one"), "output"),
        (UsageError("unknown key 'a' in r.yaml:3:1", "give one", "r.yaml:3:1"), "usage"),
        (GuardStop("the KL is 201", "give one"), "guard"),
        (PeerLost("another process of the job is gone", "see why"), "lost"),
        (EndedElsewhere("rank 0, on another machine, has ended the job", "see why"), "followed"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), "system"),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout_and_the_line_on_stderr(monkeypatch, capsys, error, kind):
    monkeypatch.setattr(app, "invoke", lambda arguments: _raise(error))
    code = main.run(["sft", "--json"])
    out, err = capsys.readouterr()
    found = error_object(out)
    assert (found["kind"], found["exit_code"]) == (kind, code)
    assert err == f"error: {found['what']}; {found['fix']}\n"
    assert found["where"] == (getattr(error, "where", None) or getattr(error, "filename", None) or None)


def _raise(error):
    raise error


def test_with_json_a_bug_is_an_object_too_and_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(app, "invoke", lambda arguments: _raise(KeyError("k")))
    with pytest.raises(KeyError):
        main.run(["sft", "--json"])
    assert error_object(capsys.readouterr().out)["kind"] == "bug"


def test_a_bug_of_a_process_that_the_command_has_started_is_that_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr(app, "invoke", lambda arguments: _raise(ProcessBug("KeyError: 'k'", "Traceback\nthere\n")))
    assert main.run(["sft", "--json"]) == 1
    out, err = capsys.readouterr()
    assert (error_object(out)["kind"], json.loads(out)["error"]["what"]) == ("bug", "KeyError: 'k'")
    assert err == "Traceback\nthere\n"


@pytest.mark.parametrize(
    "error", [UsageError("no", "give one"), KeyError("k"), OSError(errno.ENOSPC, "No space left on device", "f")]
)
def test_a_process_that_a_command_has_started_leaves_its_word_and_says_nothing(monkeypatch, capsys, tmp_path, error):
    monkeypatch.setattr(app, "invoke", lambda arguments: _raise(error))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    make_room(tmp_path, [0])
    assert main.run(["sft", "--json"]) == getattr(error, "exit_code", 1)
    assert capsys.readouterr() == ("", "")
    assert last_words(tmp_path)[0].what


def test_a_process_whose_word_cannot_be_written_says_it_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(app, "invoke", lambda arguments: _raise(UsageError("no", "give one")))
    monkeypatch.setenv(FOLDER, str(tmp_path / "gone"))
    assert main.run(["sft"]) == UsageError.exit_code
    assert capsys.readouterr().err == "error: no; give one\n"


def test_a_json_after_two_dashes_is_a_word(command, monkeypatch, capsys):
    monkeypatch.setattr(app, "invoke", lambda arguments: _raise(InputError("x", "y")))
    assert main.run(["inspect", "--", "--json"]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name, _ in all_commands()])
def test_every_command_line_that_is_refused_gives_an_object(capsys, name):
    assert main.run([*name.split(), "--no-such-flag", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "--no-such-flag" in error_object(out)["what"]
    assert err.count("\n") == 1


WRONG_FOLDERS = [
    "sft --model gone --data gone --out o",
    "merge slerp gone gone --out o",
    "merge --config gone.yaml --out o",
    "merge --config /dev/null --out o",
    "inspect .",
    "diff . .",
    "lineage .",
    "report .",
    "pipeline status .",
    "pipeline run gone --out o",
    "pick . --out o",
    "convert . --out o",
    "data inspect .",
    "recipes show gone",
    "reward eval . --data gone",
    "eval --model . --sft . --reward . --prompts .",
]
# Every line of its arguments in one process, which then must not have imported anything heavy.
REFUSED = """
import contextlib, io, json, sys
from gemma2.cli.main import main
answers = []
for line in sys.argv[1:]:
    sys.argv[1:] = [*line.split(), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code
    heavy = {"torch", "transformers", "numba", "numpy"} & {*sys.modules}
    answers.append([line, code, out.getvalue(), err.getvalue(), sorted(heavy)])
json.dump(answers, sys.stdout)
"""


def test_a_wrong_folder_is_refused_before_anything_heavy_is_imported(tmp_path):
    code, out, err = finish(start(REFUSED, *WRONG_FOLDERS, cwd=tmp_path))
    assert (code, err) == (0, "")
    answers = json.loads(out)
    assert [line for line, *_ in answers] == WRONG_FOLDERS
    faults = []
    for line, code, out, err, heavy in answers:
        found = error_object(out)
        right = code == found["exit_code"] == (2 if found["kind"] == "usage" else 1)
        if not right or err.count("\n") != 1 or not found["fix"] or heavy:
            faults.append((line, code, found, err, heavy))
    assert faults == []
    assert [*tmp_path.iterdir()] == []


def test_with_json_an_interrupt_is_an_object(tmp_path):
    process = working(tmp_path / "out", SLEEP, words=("--json",))
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    found = error_object(out)
    assert (code, found["kind"], found["exit_code"]) == (130, "interrupted", 130)
    assert err == "\ninterrupted\n"


# --- the first line on a terminal -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["sft", "--model", "m"], True),
        (["sft", "--model", "m", "--quiet"], False),
        (["sft", "-q"], False),
        (["--version"], False),
        ([], False),
    ],
)
def test_a_terminal_shows_at_once_which_command_begins(monkeypatch, words, shown):
    terminal = Terminal()
    monkeypatch.setattr(main.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    seen = []
    monkeypatch.setattr(
        app, "invoke", lambda arguments: seen.append(terminal.getvalue()) or _raise(InputError("x", "y"))
    )
    assert main.run(words) == 1
    assert seen == ["gemma2 sft: checking the inputs" if shown else ""]
    assert terminal.getvalue().endswith("\r\033[Kerror: x; y\n" if shown else "error: x; y\n")


# --- processes --------------------------------------------------------------------------------------------------------

# A stage that works until it gets a signal; it replaces the real stage, which takes seconds to import.
WORKING = """
import sys, time, types
from gemma2.posttrain.provenance import origin
from gemma2.posttrain.runs import run_directory
from gemma2.posttrain.runs.run_directory import open_run
run_directory.named_inputs = origin.named_inputs = lambda config, without=(): []
def run_sft(config, options, progress):
    with open_run("sft", config, options) as run:
        if sys.argv[-1].endswith("keep"):
            (run.checkpoints / "checkpoint-1").mkdir(parents=True)
        print("ready", flush=True)
        BODY
from gemma2.posttrain.checks.of_command import CommandChecks
CommandChecks.inputs = lambda self, config: []
CommandChecks.contents = lambda self, config, models: []
from gemma2.posttrain.checks import plan
plan.shortages = lambda *args, **kwargs: []
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


def working(out, body=SLEEP, words=(), **options):
    script = WORKING.replace("BODY", body) + MAIN
    process = start(script, "sft", "--model", "m", "--data", "d", *words, "--out", out, **options)
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        code, _, err = gemma2("recipes", "list", "--json", stdout=full)
    assert code == 1
    assert err.startswith("error: No space left on device")
    assert err.count("\n") == 1
