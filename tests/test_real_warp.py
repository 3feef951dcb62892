"""bench/real_warp.py: the reward of its task, and the rule by which a claim holds, on numbers worked by hand."""

import importlib.util
import sys
import threading

import numpy as np
import pytest
from processes import ROOT
from waiting import PATIENCE


@pytest.fixture(scope="module")
def bench():
    """The modules of the bench, which import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        found = {}
        for name in ("tasks", "real_warp"):
            spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            found[name] = module
        yield found
    finally:
        sys.path.remove(str(ROOT / "bench"))


PROMPT = [{"role": "user", "content": "Write one short sentence with the words kite and mountain."}]


@pytest.mark.parametrize(
    ("text", "cut", "score"),
    [
        ("The kite flew high over the mountain today.", False, 1.0),
        ("Two kites were flying over the little hill.", False, 0.5),
        ("Birds were flying over the little hill today.", False, 0.0),
        ("A kite and a mountain.", False, 0.0),  # five words
        ("The kite flew high over the mountain today.", True, 0.0),
        ("A kite flew over the mountain " + "and far away " * 4, False, 0.0),  # 18 words
        ("Here is one short sentence with a kite and a mountain.", False, 0.0),  # an echo
    ],
)
def test_the_reward_is_the_share_of_the_words_in_an_answer_that_keeps_the_rules(bench, text, cut, score):
    found = bench["tasks"].sentence([PROMPT], [text], [["kite", "mountain"]], [cut])
    assert found == [score]


def test_no_word_is_in_both_sets_and_no_pair_comes_twice(bench):
    tasks = bench["tasks"]
    assert not set(tasks.TRAIN_WORDS) & set(tasks.HELD_WORDS)
    rows = tasks.rows_of(tasks.HELD_WORDS, 400, 1)
    assert len({frozenset(row["words"]) for row in rows}) == 400
    assert all(word in row["prompt"] for row in rows for word in row["words"])


def difference(mean, spread, seed):
    """A difference by prompt, its mean set, as `resampled` has it."""
    values = np.random.default_rng(seed).normal(size=400)
    return spread * (values - values.mean()) + mean


@pytest.mark.parametrize(
    ("means", "spread", "verdict"),
    [
        ((0.2, 0.2), 1.0, "holds"),  # error of one 0.05, of both 0.035: 5.7 errors
        ((-0.2, -0.2), 1.0, "fails"),
        ((0.05, 0.05), 1.0, "not told apart"),  # 1.4 errors
        ((0.5, -0.01), 1.0, "not told apart"),  # 6.9 errors, but the second has the other sign
    ],
)
def test_a_claim_holds_by_three_errors_and_the_sign_of_every_replicate(bench, means, spread, verdict):
    real_warp = bench["real_warp"]
    values = [real_warp.resampled(difference(mean, spread, seed)) for seed, mean in enumerate(means)]
    claim = real_warp.Claim("C", "words", values)
    assert claim.verdict() == verdict
    value, error = claim.pooled(values)
    assert value == pytest.approx(sum(means) / 2)
    assert error == pytest.approx(spread / np.sqrt(400 * 2), rel=0.15)


def test_resamples_are_the_same_for_all_columns(bench):
    values = np.random.default_rng(0).normal(size=50)
    first, second = (bench["real_warp"].resampled(column) for column in (values, values + 1))
    assert np.allclose(second - first, 1)


# --- steps side by side ---------------------------------------------------------------------------------------------


@pytest.fixture
def real(bench):
    """bench/real.py, as bench/real_warp.py has imported it."""
    return sys.modules["real"]


def test_a_step_waits_for_the_outputs_that_its_command_names_and_for_no_others(bench, real):
    size = bench["real_warp"].REHEARSAL
    chain = [real.Step("convert", "convert file.gguf", "base"), *bench["real_warp"].steps(size)]
    number = {step.out: place for place, step in enumerate(chain)}

    def needed(out):
        found = real.sources(chain[number[out]], chain[: number[out]])
        return {chain[place].out for place in found}

    assert needed("data") == {"base"} and needed("sft") == {"base", "clean"}
    assert needed("rl-5") == needed("rl-1") == {"sft"}
    assert needed("slerp-b") == {"rl-3", "rl-4", "sft"}
    assert needed("rl-6") == {"liti-a", "sft"}
    assert needed("front-a") == {"sft", "base", "rl-1", "rl-2", "linear-a", "rl-5", "slerp-a"}


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_steps_run_side_by_side_and_never_before_their_sources(real, tmp_path, monkeypatch, jobs):
    steps = [real.Step("a", "make", "a"), real.Step("b", "make", "b"), real.Step("c", "join a,b", "c")]
    together, ended, running = threading.Barrier(2), [], []

    def perform(step, directory):
        if jobs > 1 and step.name != "c":
            together.wait(PATIENCE)  # passes only with both inside
        ended.append(step.name)
        return step.name

    def wait(futures, **options):
        running.append(len(futures))
        return real_wait(futures, **options)

    monkeypatch.setattr(real, "perform", perform)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    real_wait = real.wait
    monkeypatch.setattr(real, "wait", wait)
    assert real.perform_all(steps, tmp_path, jobs) == ["a", "b", "c"]
    assert running[0] == min(jobs, 2) and running[-1] == 1
    assert ended[-1] == "c"


def test_a_step_that_fails_ends_the_run_when_those_next_to_it_have_ended(real, tmp_path, monkeypatch):
    steps = [real.Step("bad", "make", "a"), real.Step("good", "make", "b"), real.Step("never", "join a,b", "c")]
    failed, ended = threading.Event(), []

    def perform(step, directory):
        if step.name == "bad":
            failed.set()
            sys.exit("error: gemma2 bad ended with 1")
        assert failed.wait(PATIENCE)
        ended.append(step.name)
        return step.name

    monkeypatch.setattr(real, "perform", perform)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match="gemma2 bad ended with 1"):
        real.perform_all(steps, tmp_path, 2)
    assert ended == ["good"]
