"""Algorithm 1 of WARP (2406.16768) through `gemma2 warp`, against arithmetic on the files that it leaves.

The stages run in this process, which has the libraries: a server of processes would import them again, for 10 s.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from stages import Inline

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.pipelines import warp as stages_of_warp
from gemma2.posttrain.pipelines.scheduler import StageFailed
from gemma2.posttrain.tiny.networks import save_random
from gemma2.posttrain.tiny.tasks import questions

pytestmark = pytest.mark.long

ETA, MU, POLICIES = 0.4, 0.25, 3


def weights(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float64) for name, tensor in load_file(directory / "model.safetensors").items()}


def group_of(name: str) -> str:
    return name.split("layers.")[1].split(".")[0] if "layers." in name else name


def parents(directory: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for parent in json.loads((directory / "gemma2.json").read_text())["parents"]:
        found.setdefault(parent["role"], []).append((directory / parent["path"]).resolve())
    return found


def sequential_slerp(init: dict, policies: list[dict]) -> dict:
    """Eq. 26 in float64: the k-th policy joins with lambda = 1/k, one angle per group of tensors."""
    merged = {name: policies[0][name] - init[name] for name in init}
    for k, policy in enumerate(policies[1:], start=2):
        delta = {name: policy[name] - init[name] for name in init}
        joined = {}
        for group in {group_of(name) for name in init}:
            names = [name for name in init if group_of(name) == group]
            a = np.concatenate([merged[name].ravel() for name in names])
            b = np.concatenate([delta[name].ravel() for name in names])
            omega = np.arccos(a @ b / np.sqrt((a @ a) * (b @ b)))
            for name in names:
                joined[name] = (np.sin((1 - 1 / k) * omega) * merged[name] + np.sin(omega / k) * delta[name]) / np.sin(
                    omega
                )
        merged = joined
    return {name: init[name] + merged[name] for name in init}


def line(start: dict, end: dict, eta: float) -> dict:
    return {name: (1 - eta) * start[name] + eta * end[name] for name in start}


def check_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-6, atol=2e-7, err_msg=name)


def stop_often(generation_config: Path) -> None:
    """A fifth of the vocabulary ends a turn: an untrained model then answers in a few tokens, not in hundreds."""
    settings = json.loads(generation_config.read_text())
    generation_config.write_text(json.dumps(settings | {"eos_token_id": [*settings["eos_token_id"], *range(300, 400)]}))


@pytest.fixture(scope="module", autouse=True)
def _stages_run_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_of_warp, "executor_of", lambda name, jobs, **more: Inline(jobs))
        patch.chdir(".")  # a stage changes the working folder and the environment
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warp")
    save_random(root / "sft", seed=0)
    stop_often(root / "sft" / "generation_config.json")
    save_random(root / "reward", seed=1, kind="reward")
    for split, count in (("train", 24), ("heldout", 24)):
        rows = questions(split, count, seed=0)
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rl_flags(root: Path) -> list[str]:
    settings = {
        "reward": root / "reward",
        "prompts": root / "train.jsonl",
        "heldout": root / "heldout.jsonl",
        "prompts-per-step": 2,
        "n": 2,
        "mu": MU,
        "temperature": 1.0,
        "max-new-tokens": 16,
        "eval-every": 50,
        "eval-prompts": 10,
        "learning-rate": 1e-3,
        "warmup-steps": 0,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def warp(inputs: Path) -> Path:
    out = inputs / "warp"
    shape = ["--policies", str(POLICIES), "--iterations", "2", "--eta", str(ETA), "--steps", "2", "--etas", "0,0.5,1"]
    shape += ["--cpus", "1"]  # as many threads as a process of the tests has
    command = ["warp", "--sft", str(inputs / "sft"), *rl_flags(inputs), *shape, "--pick", "eta=0.5", "--quiet"]
    assert invoke([*command, "--out", str(out)]) == 0
    return out


def init_of(warp: Path, iteration: int) -> Path:
    return warp.parent / "sft" if iteration == 1 else warp / f"iteration-{iteration - 1}" / "init"


@pytest.mark.parametrize("iteration", [1, 2])
def test_every_policy_starts_from_the_init_of_its_iteration(warp: Path, iteration: int) -> None:
    seeds = set()
    for m in range(1, POLICIES + 1):
        policy = warp / f"iteration-{iteration}" / f"policy-{m}"
        assert parents(policy)["policy"] == [init_of(warp, iteration).resolve()]
        assert parents(policy).get("sft", [warp.parent / "sft"]) == [(warp.parent / "sft").resolve()]
        seeds.add(json.loads((policy / "gemma2.json").read_text())["seed"])
    assert len(seeds) == POLICIES


@pytest.mark.parametrize("iteration", [1, 2])
def test_slerp_merges_the_policies_one_after_the_other(warp: Path, iteration: int) -> None:
    here = warp / f"iteration-{iteration}"
    policies = [weights(here / f"policy-{m}") for m in range(1, POLICIES + 1)]
    expected = sequential_slerp(weights(init_of(warp, iteration)), policies)
    check_equal(weights(here / "slerp"), expected)
    anchors = sequential_slerp(
        weights(init_of(warp, iteration)), [weights(here / f"policy-{m}" / "ema") for m in range(1, POLICIES + 1)]
    )
    name = "model.embed_tokens.weight"
    assert np.abs(anchors[name] - expected[name]).max() > 1e-4  # merging the anchors would be seen


@pytest.mark.parametrize("iteration", [1, 2])
def test_the_next_init_lies_between_this_iterations_init_and_its_slerp(warp: Path, iteration: int) -> None:
    here = warp / f"iteration-{iteration}"
    check_equal(weights(here / "init"), line(weights(init_of(warp, iteration)), weights(here / "slerp"), ETA))


def test_the_summary_has_the_angle_between_the_policies_in_the_blocks_and_its_noise_scale(warp: Path) -> None:
    init = weights(warp.parent / "sft")
    policies = [weights(warp / "iteration-1" / f"policy-{m}") for m in range(1, POLICIES + 1)]
    angles = []
    for block in sorted({group_of(name) for name in init if "layers." in name}):
        names = [name for name in init if "layers." in name and group_of(name) == block]
        vectors = [np.concatenate([(one[name] - init[name]).ravel() for name in names]) for one in policies]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            dot, norms = vectors[a] @ vectors[b], np.linalg.norm(vectors[a]) * np.linalg.norm(vectors[b])
            angles.append(np.degrees(np.arccos(dot / norms)))
    summary = json.loads((warp / "gemma2.json").read_text())["summary"]
    assert summary["angle"] == pytest.approx(np.mean(angles), abs=0.01)
    assert summary["angle_completions"] == 2 * 2 * 2  # steps, prompts per step, samples
    cosine = np.cos(np.radians(np.mean(angles)))
    assert summary["noise_scale"] == (pytest.approx(8 * (1 / cosine - 1), rel=1e-2) if cosine > 0 else None)


def test_diff_has_the_noise_scale_of_two_rl_runs_from_its_base(warp: Path, capsys: pytest.CaptureFixture) -> None:
    first, second, third = (str(warp / "iteration-1" / f"policy-{m}") for m in range(1, POLICIES + 1))
    base = ["--base", str(warp.parent / "sft"), "--json"]
    for forms in ([], ["--granularity", "tensor"]):
        assert invoke(["diff", first, second, *base, *forms]) == 0
        runs = json.loads(capsys.readouterr().out)["runs"]
        assert runs["angle_completions"] == 8
        cosine = np.cos(np.radians(runs["angle"]))  # under 0 for two steps that have little in common
        assert runs["noise_scale"] == (pytest.approx(8 * (1 / cosine - 1), rel=1e-3) if cosine > 0 else None)
    found = []
    for a, b in ((first, second), (first, third), (second, third)):
        assert invoke(["diff", a, b, *base]) == 0
        found.append(json.loads(capsys.readouterr().out)["runs"]["angle"])
    summary = json.loads((warp / "gemma2.json").read_text())["summary"]
    assert np.mean(found) == pytest.approx(summary["angle"], abs=0.01)
    for other in (str(warp / "iteration-1" / "slerp"), str(warp / "iteration-2" / "policy-1")):
        assert invoke(["diff", first, other, *base]) == 0  # a merge; a run from another init
        assert "runs" not in json.loads(capsys.readouterr().out)


def test_the_model_lies_between_the_sft_policy_and_the_last_slerp(warp: Path) -> None:
    last = weights(warp / "iteration-2" / "slerp")
    check_equal(weights(warp / "model"), line(weights(warp.parent / "sft"), last, 0.5))


def test_the_front_starts_at_the_sft_policy_with_no_kl(warp: Path) -> None:
    points = json.loads((warp / "front" / "front.json").read_text())["points"]
    ends = {point["eta"]: point for point in points if point["kind"] == "line"}
    sft = next(point for point in points if point["kind"] == "sft")
    assert ends[0.0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert ends[0.0]["reward"] == pytest.approx(sft["reward"], abs=1e-6)
    assert 0.0 < ends[0.5]["kl"] < ends[1.0]["kl"]


def test_the_anchor_follows_its_recursion_from_the_init(inputs: Path) -> None:
    """Runs of 1, 2 and 3 steps with one seed share their beginning: their policies are theta_1, theta_2, theta_3."""
    base = ["rlhf", "--policy", str(inputs / "sft"), *rl_flags(inputs), "--quiet", "--seed", "5"]
    policies = []
    for steps in (1, 2, 3):
        out = inputs / f"steps-{steps}"
        assert invoke([*base, "--steps", str(steps), "--out", str(out)]) == 0
        policies.append(weights(out))
    anchor = weights(inputs / "sft")
    for policy in policies:
        anchor = line(anchor, policy, MU)
    check_equal(weights(inputs / "steps-3" / "ema"), anchor)
    name = "model.embed_tokens.weight"
    assert np.abs(anchor[name] - policies[-1][name]).max() > 1e-3
    assert np.abs(anchor[name] - weights(inputs / "sft")[name]).max() > 1e-3


def test_a_second_run_into_the_output_is_refused_and_resume_has_nothing_to_do(warp: Path, inputs: Path) -> None:
    from gemma2.core.errors import OutputError

    command = ["warp", "--sft", str(inputs / "sft"), *rl_flags(inputs), "--steps", "2", "--quiet", "--out", str(warp)]
    with pytest.raises(OutputError, match="exists"):
        invoke(command)
    with pytest.raises(OutputError, match="nothing to resume"):
        invoke([*command, "--resume"])


def test_a_dry_run_checks_every_stage_and_writes_nothing(inputs: Path, capsys: pytest.CaptureFixture) -> None:
    out = inputs / "planned"
    command = ["warp", "--sft", str(inputs / "sft"), *rl_flags(inputs), "--dry-run", "--json", "--out", str(out)]
    assert invoke([*command, "--policies", "3", "--iterations", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages_to_run"] == len(document["stages"]) == 2 * (3 + 3) + 2
    with pytest.raises(UsageError, match=r"stages\.iteration-1/policy-2\.options\.learning_rate"):
        invoke([*command, "--vary", "learning_rate=1e-3:x"])
    with pytest.raises(InputError, match=r"stages\.iteration-1/policy-2: --reward .*gone is not a directory"):
        invoke([*command, "--vary", f"reward={inputs / 'reward'}:gone"])
    assert not out.exists()


def test_the_log_of_a_stage_that_failed_is_there_to_read(inputs: Path) -> None:
    out = inputs / "failing"
    command = ["warp", "--sft", str(inputs / "sft"), *rl_flags(inputs), "--steps", "1", "--quiet", "--out", str(out)]
    with pytest.raises(StageFailed, match=r"stage iteration-1/policy-1: .*its log is ") as caught:
        invoke([*command, "--max-kl", "1e-9", "--cpus", "1"])
    assert Path(str(caught.value).rpartition("its log is ")[2]).is_file()
