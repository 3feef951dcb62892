"""`gemma2 watch` from the command line: its forms, its exit codes, and alerts that end real runs."""

import json
import os
import pty
import re
import signal
import sys
import urllib.request
from pathlib import Path

import pytest
from processes import MAIN, finish, start
from waiting import wait_for

sys.path.append(str(Path(__file__).parents[2] / "posttrain/watch"))
from rl_job import environment, words, write_job
from watched_folder import Folder, evaluation, line

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.core.json_files import write_json
from gemma2.core.outputs.staging import partial_path

NASTY = "\x1b[2J\x9b31m<b>\u202eevil\x07"


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "out")
    yield made
    made.released()


@pytest.fixture
def finished(folder):
    folder.pipeline("failed", **{"rl": {"status": "failed", "error": f"it {NASTY} broke"}, f"b{NASTY}": "blocked"})
    run = folder.run(folder.root / "rl")
    folder.add(run, line(1), evaluation(1), {"step": 1, "learning_rate": 1, f"rewards/{NASTY}": 2.0})
    turns = [{"role": "user", "content": f"{NASTY} why?\nTell me."}]
    row = {"step": 1, "prompt": turns, "completion": f"<script>{NASTY}</script>", "reward": 0.25}
    folder.add(run, row, name="samples.jsonl")
    return folder.root


def shown(capsys, *arguments):
    assert invoke(["watch", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# --- forms ------------------------------------------------------------------------------------------------------------


def test_what_is_over_is_shown_and_left(finished, capsys):
    text = shown(capsys, finished)
    for part in (
        "failed",
        "0 of 2 stages",
        "✗ rl",
        "it \\x1b",
        "broke",
        "reward",
        "KL to SFT",
        "why?",
        "<script>",
        "0.25",
    ):
        assert part in text, part


@pytest.mark.parametrize("form", [[], ["--once"], ["--json"], ["--json", "--once"]])
def test_no_control_character_of_a_run_reaches_the_terminal(finished, capsys, form):
    text = shown(capsys, finished, *form)
    assert "evil" in text
    assert [char for char in text if not char.isprintable() and char != "\n"] == []


def test_json_once_is_one_document_and_json_alone_is_lines(finished, capsys):
    document = json.loads(shown(capsys, finished, "--json", "--once"))
    assert document["stages"][0]["sample"]["completion"] == f"<script>{NASTY}</script>"
    assert (document["status"], document["over"]) == ("failed", True)
    lines = shown(capsys, finished, "--json").splitlines()
    assert [json.loads(line) for line in lines] == [document]


def test_many_stages_are_counted(folder, capsys):
    stages = {f"s-{number}": "complete" if number < 90 else "waiting" for number in range(200)}
    folder.pipeline("failed", **{**stages, "bad": {"status": "failed", "error": "broke"}})
    text = shown(capsys, folder.root)
    assert "✗ bad" in text and "90 complete, 107 waiting" in text
    assert len(text.splitlines()) < 20


def test_a_run_that_does_not_exist_is_refused_once_with_the_nearest(folder, tmp_path):
    folder.pipeline("failed")
    with pytest.raises(
        InputError, match=r"ouz does not exist yet \(did you mean 'out'\?\); start it, or give the --out"
    ):
        invoke(["watch", str(tmp_path / "ouz"), "--once"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "80"], "--port is for --page"),
        (["--page", "--json"], "--page and --json exclude each other"),
        (["--page", "--once"], "--page and --once exclude each other"),
        (["--once", "--alert", "kl > 1"], "--alert watches, --once looks once"),
        (["--alert", "kl"], "is not a comparison"),
        (["--alert", "kll > 1"], "logs no metric 'kll'"),
    ],
)
def test_what_does_not_fit_is_refused(finished, arguments, said):
    with pytest.raises(UsageError, match=said):
        invoke(["watch", str(finished), *arguments])


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_ctrl_c_ends_the_watching_and_not_the_run(folder):
    run = folder.run()
    folder.held()
    folder.add(run, line(1))
    before = {path: path.read_bytes() for path in run.iterdir()}
    process = start(MAIN, "watch", folder.root)
    assert "running" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err.strip()) == (130, "interrupted")
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.long
def test_it_waits_for_a_run_and_ends_with_it(folder):
    process = start(MAIN, "watch", folder.root, "--json")
    assert "does not exist yet; waiting for it" in process.stderr.readline()
    folder.held()
    run = folder.run()
    assert json.loads(process.stdout.readline())["status"] == "running"
    folder.add(run, line(1))
    assert json.loads(process.stdout.readline())["stages"][0]["figures"]["reward"] == 0.1
    write_json(run / "gemma2.json", {"command": "rlhf", "status": "complete"})
    run.rename(folder.root)
    folder.released()
    code, out, _ = finish(process)
    assert (code, json.loads(out.splitlines()[-1])["status"]) == (0, "complete")


@pytest.mark.long
def test_on_a_terminal_it_is_drawn_in_place(folder):
    folder.held()
    folder.add(folder.run(), line(1), {"step": 1, "prompt": "x", "completion": NASTY}, name="metrics.jsonl")
    reader, writer = pty.openpty()
    process = start(MAIN, "watch", folder.root, stdout=writer, stderr=writer, env={**os.environ, "TERM": "xterm"})
    os.close(writer)
    text = b""
    while b"gradient norm" not in text:
        text += os.read(reader, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(reader, 4096):
            text += chunk
    except OSError:  # the last writer has gone
        pass
    assert process.wait() == 130
    assert b"\x1b[?25l" in text and b"\x1b[?25h" in text  # the cursor comes back
    os.close(reader)


@pytest.mark.long
def test_the_page_shows_the_run_and_stays_until_ctrl_c(finished):
    process = start(MAIN, "watch", finished, "--page")
    url = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32,}/", url)

    def get(path):
        with urllib.request.urlopen(url + path) as answer:
            return answer.read()

    assert b"gemma2 watch" in get("")
    document = wait_for(lambda: (found := json.loads(get("view.json"))).get("stages") and found)
    assert document["stages"][0]["name"] == "rl"
    assert json.loads(get("stage.json?name=rl"))["curves"]["kl"] == [[1, 0.5]]
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


# --- alerts that end real runs ----------------------------------------------------------------------------------------

SHORT = "--steps 2000 --prompts-per-step 2 --n 2 --save-every 2 --eval-every 3 --quiet"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.mark.slow
@pytest.mark.parametrize("saved", [True, False])
def test_an_alert_ends_a_run_with_its_own_exit_code_and_says_how_it_goes_on(job, tmp_path, saved):
    out = tmp_path / "out"
    line = words(job, out, SHORT if saved else SHORT.replace("--save-every 2", "--save-every 1000"))
    run = start(MAIN, *line, env=environment(job))
    code, _, err = finish(start(MAIN, "watch", out, "--alert", "learning_rate > 1e-9"))
    assert code == 4
    said = r"learning_rate 0\.001 > 1e-09 at step \d+; "
    kept = "its last checkpoint is kept: the same command with --resume goes on from there"
    lost = "it had no checkpoint yet: the same command starts it again"
    assert re.search(rf"error: alert in out: {said[:-2]}; it was ended; {kept if saved else lost}\n", err)
    code, _, err = finish(run)
    assert code == 4
    way = "--resume continues from the last checkpoint, --force starts over"
    assert re.search(rf"error: step \d+ of RL: ended by an alert: {said}{way if saved else lost}\n", err)
    assert "work done so far" not in err
    partial = partial_path(out)
    assert partial.exists() == saved and not (partial / ".alert.json").exists()
    metrics = partial / "metrics.jsonl"
    before = metrics.read_text() if saved else ""
    again = start(MAIN, *line, *["--resume"] * saved, env=environment(job))  # what both of them say
    wait_for(lambda: (metrics.is_file() and metrics.read_text() != before) or again.poll() is not None)
    again.send_signal(signal.SIGINT)
    assert finish(again)[0] == 130


@pytest.mark.slow
def test_an_alert_fails_a_stage_and_a_later_run_goes_on(job, tmp_path):
    options = {"policy": f"{job}/policy", "prompts": f"{job}/prompts.jsonl", "heldout": f"{job}/prompts.jsonl"}
    options |= {"reward_fn": ["judge:judge"], "max_new_tokens": 16, "prompts_per_step": 2, "n": 2, "eval_prompts": 4}
    options |= {"steps": 2000, "save_every": 2, "eval_every": 3, "learning_rate": 1e-3}
    file, out = tmp_path / "p.yaml", tmp_path / "out"
    file.write_text(json.dumps({"stages": {"rl": {"command": "rlhf", "options": options}}}))
    arguments = ["pipeline", "run", file, "--out", out, "--quiet"]
    run = start(MAIN, *arguments, env=environment(job))
    code, said, _ = finish(start(MAIN, "watch", out, "--alert", "kl >= 0", "--json"))
    assert (code, json.loads(said.splitlines()[-1])["error"]["kind"]) == (4, "alert")
    code, _, err = finish(run)
    assert code == 4
    assert re.search(r"error: stage rl: step \d+ of RL: ended by an alert: kl .* >= 0 at step \d+", err)
    assert json.loads((out / "pipeline.json").read_text())["stages"]["rl"]["exit_code"] == 4
    reached = max(int(path.name.rpartition("-")[2]) for path in (out / ".rl.partial/checkpoints").glob("checkpoint-*"))
    again = start(MAIN, *arguments, env=environment(job))
    metrics = out / ".rl.partial/metrics.jsonl"
    wait_for(lambda: f'"step": {reached + 4},' in metrics.read_text() or again.poll() is not None)
    again.send_signal(signal.SIGINT)
    assert finish(again)[0] == 130
    steps = [json.loads(row)["step"] for row in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(1) == 1  # it went on, and did not begin again
