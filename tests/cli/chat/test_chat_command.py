"""`gemma2 chat` as it is typed: commands, mistakes, and a real terminal with Ctrl-C, narrow, wide and dumb."""

import json
import os
import pty
import re
import select
import signal
import sys

import pytest
from processes import BARE_CHECKOUT, MAIN, finish, gemma2, start
from waiting import wait_for

from gemma2.cli.chat.input_lines import InputLines
from gemma2.cli.chat.loop import HELP, Chat
from gemma2.cli.chat.screen import Screen
from gemma2.core.errors import InputError
from gemma2.posttrain.chat.speaker import Spoken
from gemma2.posttrain.chat.talk import Talk
from gemma2.posttrain.tiny.networks import random_model, save_random, tiny_tokenizer


class Parrot:
    """Answers with the question and its seed, a word at a time."""

    def __init__(self, name="parrot"):
        self.name, self.context, self.computed = name, 100, 0

    def prompt(self, messages):
        if len(messages) > 20:
            raise InputError("the conversation has 101 tokens, the context 100", "/clear begins a new one")

    def answer(self, messages, params, seed):
        for word in f"{self.name} {messages[-1]['content']} {seed} {params.temperature:g}".split(" "):
            yield Spoken(f"{word} ")
        yield Spoken("", "stop")


@pytest.fixture
def chat(capsys):
    return Chat([Parrot()], Talk(["parrot"]), Screen())


def shown(capsys, chat, *lines):
    capsys.readouterr()
    for line in lines:
        chat.take(line)
    return capsys.readouterr().out


def test_questions_retry_undo_edit_and_clear(capsys, chat):
    assert shown(capsys, chat, "hi") == "parrot hi 0 1 \n"
    assert chat.talk.turns == [("hi", ["parrot hi 0 1"])]
    assert shown(capsys, chat, "/retry") == "parrot hi 1 1 \n"  # another seed
    assert shown(capsys, chat, "/edit") == "" and chat.begin == "hi" and chat.talk.turns == []
    shown(capsys, chat, "a", "b")
    assert "took back: b" in shown(capsys, chat, "/undo")
    assert [asked for asked, _ in chat.talk.turns] == ["a"]
    shown(capsys, chat, "/clear")
    assert chat.talk.turns == []


def test_settings_system_text_and_files(capsys, chat, tmp_path):
    assert "temperature=0.5" in shown(capsys, chat, "/set temperature=0.5 seed=9")
    assert shown(capsys, chat, "hi") == "parrot hi 9 0.5 \n"
    shown(capsys, chat, "/system Be brief.", f"/save {tmp_path}/talk.json", "/clear", f"/load {tmp_path}/talk.json")
    assert chat.talk.system == "Be brief." and chat.talk.turns == [("hi", ["parrot hi 9 0.5"])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/udno", "unknown command /udno; did you mean /undo?"),
        ("/undo", "nothing to take back"),
        ("/retry", "nothing to take back"),
        ("/set temprature=1", "did you mean 'temperature'?"),
        ("/save", "a file is missing"),
        ("/load nothing.json", "nothing.json does not exist"),
        ("/score", "/score needs a reward model"),
        ("/score nothing", "nothing to score"),
        ("/vote a", "nothing to compare"),
        ("/swap", "one model only"),
    ],
)
def test_a_mistake_is_a_line_and_the_chat_goes_on(capsys, chat, line, message):
    found = shown(capsys, chat, line)
    assert found.startswith("error: ") and message in found and found.count("\n") == 1
    assert shown(capsys, chat, "hi") == "parrot hi 0 1 \n"


def test_a_full_context_is_said_and_nothing_is_lost(capsys, chat):
    shown(capsys, chat, *map(str, range(10)))
    assert "the context 100" in shown(capsys, chat, "more")
    assert len(chat.talk.turns) == 10


def test_every_command_is_in_the_help(capsys, chat):
    found = shown(capsys, chat, "/help")
    assert all(name in found for name in HELP)
    for name in HELP:
        if name.startswith("/") and name != "/quit":
            assert "unknown command" not in shown(capsys, chat, name.split()[0])


def test_two_models_get_the_same_seed_and_a_vote_is_kept(capsys, tmp_path):
    talk = Talk(["left", "right"], votes=tmp_path / "votes.jsonl")
    chat = Chat([Parrot("left"), Parrot("right")], talk, Screen())
    assert shown(capsys, chat, "hi") == "left:\nleft hi 0 1 \nright:\nright hi 0 1 \n"
    assert "right is better" in shown(capsys, chat, "/vote b")
    row = json.loads((tmp_path / "votes.jsonl").read_text())
    assert row["chosen_model"] == "right" and row["rejected"][0]["content"] == "left hi 0 1"
    shown(capsys, chat, "/swap")
    assert shown(capsys, chat, "so").startswith("right:\nright so")


def test_control_characters_of_a_model_are_escaped(capsys, chat):
    assert shown(capsys, chat, "a\x1b[2Jb") == "parrot a\\x1b[2Jb 0 1 \n"


def test_several_lines_between_quotes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = iter(['"""first', "second", 'third"""', "one"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    typed = InputLines()
    assert typed.message("") == "first\nsecond\nthird"
    assert typed.message("") == "one"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Answers for hundreds of tokens: there is time to press Ctrl-C."""
    path = tmp_path_factory.mktemp("chat") / "model"
    random_model(hidden_size=64, num_hidden_layers=6).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_wrong_inputs_are_refused_before_anything_is_loaded(tmp_path):
    save_random(tmp_path / "reward", kind="reward")
    for words, message in [
        ((tmp_path / "none", "-p", "hi"), "is not a directory"),
        ((tmp_path / "reward", "-p", "hi"), "is a reward model"),
        ((tmp_path / "reward", "-p", " "), "there is no question"),
        ((tmp_path / "reward", "-p", "hi", "--dtype", "int8"), "--dtype int8 is unknown"),
        ((tmp_path / "reward", "-p", "hi", "--attention", "flex_attention"), "flex_attention does not draw answers"),
    ]:
        code, out, err = gemma2("chat", *words)
        assert code in (1, 2) and out == "" and message in err and err.count("\n") == 1, err


def test_a_text_on_stdin_is_answered_once(model, tmp_path):
    (tmp_path / "question").write_text("What is 2 plus 3?")
    words = ("chat", model, "--temperature", "0", "--max-new-tokens", "5", "--quiet")
    with (tmp_path / "question").open() as stdin:
        code, piped, err = finish(start(MAIN, *words, stdin=stdin))
    assert code == 0 and "\x1b" not in piped and err == "(cut at max_new_tokens)\n", err
    code, document, _ = gemma2(*words, "-p", "What is 2 plus 3?", "--json")
    assert code == 0 and json.loads(document)["answers"][0]["answer"] == piped.removesuffix("\n")


class Terminal:
    """A process behind a pseudo-terminal of some width."""

    def __init__(self, model, width=80, term="xterm", more=()):
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ.update(TERM=term, COLUMNS=str(width), HOME=str(model.parent), XDG_CACHE_HOME=str(model.parent))
            os.environ.pop("NO_COLOR", None)
            words = ["chat", str(model), "--temperature", "0", *map(str, more)]
            os.execv(sys.executable, [sys.executable, "-c", BARE_CHECKOUT + MAIN, *words])
        self.seen = ""

    def read(self):
        if select.select([self.descriptor], [], [], 0)[0]:
            try:
                self.seen += os.read(self.descriptor, 65536).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                return True
        return False

    def until(self, text):
        """What came up to a text, which is taken away."""

        def there():
            closed = self.read()
            assert text in self.seen or not closed, self.seen
            return text in self.seen

        wait_for(there)
        found, _, self.seen = self.seen.partition(text)
        return found + text

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def end(self):
        wait_for(self.read)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.descriptor)
        return code


def test_ctrl_c_ends_an_answer_and_not_the_chat(model):
    terminal = Terminal(model, more=["--max-new-tokens", "100000"])
    terminal.until(">>> ")
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit ends")
    terminal.until(">>> ")
    terminal.type("Tell me a long story.\n")
    terminal.until("story.\r\n")
    wait_for(lambda: terminal.read() or len(terminal.seen) > 20)  # it streams
    terminal.type("\x03")
    terminal.until("(stopped)")
    terminal.until(">>> ")
    terminal.type("/undo\n")
    terminal.until("took back: Tell me a long story.")
    terminal.until(">>> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("width", "term"), [(140, "xterm"), (60, "xterm"), (140, "dumb")])
def test_two_models_in_columns_or_one_under_the_other(model, tmp_path, width, term):
    terminal = Terminal(model, width, term, ["--against", model, "--max-new-tokens", "12"])
    terminal.until(">>> ")
    terminal.type("Hi\n")
    terminal.until("Hi\r\n")
    found = terminal.until(">>> ")
    columns = re.search(r"model \(a\)\s+\| model \(b\)", found)
    assert bool(columns) == (width == 140 and term == "xterm"), found
    assert ("\x1b[" in found) == (term == "xterm")
    terminal.type("/quit\n")
    assert terminal.end() == 0
