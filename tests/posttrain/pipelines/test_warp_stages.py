"""Algorithm 1 of WARP as `gemma2 warp` compiles it, against a transcription of the paper's listing, on a model of two
layers with a deterministic step in the place of RL: the same tensors after I = 2, M = 3."""

import json
from pathlib import Path

import numpy as np
import pytest
from light_model import write_tokenizer
from stages import Inline, Stub, compiled, run

from gemma2.core.progress import SILENT
from gemma2.posttrain.pipelines.check import check_pipeline
from gemma2.posttrain.pipelines.quickstart import quickstart_pipeline
from gemma2.posttrain.pipelines.run import run_stages
from gemma2.posttrain.pipelines.warp_stages import run_seed
from gemma2.posttrain.runs.commands import COMMANDS
from gemma2.posttrain.runs.run_directory import RunResult, open_run
from gemma2.posttrain.schemas import ParetoConfig, RlhfConfig

SHAPES = {
    "model.embed_tokens.weight": (128, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
}
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": 8, "num_hidden_layers": 2,
    "vocab_size": 128, "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
I, M, T, ETA, MU, RATE, MOMENTUM = 2, 3, 4, 0.3, 0.25, 0.1, 0.5  # noqa: E741 - the paper's names


def save(path: Path, tensors: dict) -> None:
    header, data = {}, b""
    for name, value in tensors.items():
        raw = value.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def load(path: Path) -> dict:
    blob = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(blob[8 + size :][slice(*entry["data_offsets"])], "<f4")
        .reshape(entry["shape"])
        .astype(float)
        for name, entry in header.items()
    }


def gradient(theta: dict, anchor: dict, seed: int, t: int) -> dict:
    """A deterministic stand-in for r_beta * grad log pi: noise of the run, a pull towards the anchor."""
    noise = np.random.default_rng([seed, t])
    return {k: noise.standard_normal(theta[k].shape) - 0.3 * (theta[k] - anchor[k]) for k in theta}


# --- the transcription ------------------------------------------------------------------------------------------------


def opt(theta: dict, grad: dict, state: dict) -> dict:
    for k in theta:
        state[k] = MOMENTUM * state.get(k, 0.0) + grad[k]
    return {k: theta[k] + RATE * state[k] for k in theta}


def slerp_pair(a: dict, b: dict, share: float, group: list[str]) -> dict:
    x, y = (np.concatenate([v[k].ravel() for k in group]) for v in (a, b))
    omega = np.arccos(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return {k: (np.sin((1 - share) * omega) * a[k] + np.sin(share * omega) * b[k]) / np.sin(omega) for k in group}


def slerp(init: dict, thetas: list[dict]) -> dict:
    layer = {k: k.split("layers.")[1][0] if "layers." in k else k for k in init}
    merged = {k: thetas[0][k] - init[k] for k in init}
    for count, theta in enumerate(thetas[1:], start=2):  # eq. 26: the k-th joins with lambda = 1/k
        delta = {k: theta[k] - init[k] for k in init}
        parts = [slerp_pair(merged, delta, 1 / count, [k for k in init if layer[k] == g]) for g in set(layer.values())]
        merged = {k: value for part in parts for k, value in part.items()}
    return {k: init[k] + merged[k] for k in init}


def line(start: dict, end: dict, eta: float) -> dict:
    return {k: (1 - eta) * start[k] + eta * end[k] for k in start}


def algorithm_1(sft: dict) -> dict[str, dict]:
    found, init = {}, sft
    for i in range(1, I + 1):
        thetas = []
        for m in range(1, M + 1):
            theta, ema, state = dict(init), dict(init), {}
            for t in range(1, T + 1):
                theta = opt(theta, gradient(theta, ema, run_seed(7, i, m), t), state)
                ema = line(ema, theta, MU)
            thetas.append(theta)
            found |= {f"iteration-{i}/policy-{m}": theta, f"iteration-{i}/policy-{m}/ema": ema}
        found[f"iteration-{i}/slerp"] = slerp(init, thetas)
        init = line(init, found[f"iteration-{i}/slerp"], ETA)
        found[f"iteration-{i}/init"] = init
    return found | {"model": line(sft, found[f"iteration-{I}/slerp"], 0.5)}


# --- the pipeline -----------------------------------------------------------------------------------------------------


def rl(config, options, progress):
    """`gemma2 rlhf` with the step above: policy and anchor start at --policy, the optimizer at nothing."""
    with open_run("rlhf", config, options) as out:
        theta, ema, state = load(config.policy), load(config.policy), {}
        for t in range(1, config.steps + 1):
            theta = opt(theta, gradient(theta, ema, config.seed, t), state)
            ema = line(ema, theta, config.mu)
        save(out.path, theta)
        save(out.path / "ema", ema)
        return out.finish({})


def front(config, options, progress):
    """`gemma2 pareto` without measuring: iteration i does not improve on the one before it from i = `flat_from` on."""
    name = options.out.parent.name
    flat = 0 if name in ("iteration-1", "w") else 1
    with open_run("pareto", config, options) as out:
        (out.path / "front.json").write_text(json.dumps({"merged": str(config.merged), "fronts": len(config.fronts)}))
        return out.finish({"flat": flat})


def choose(config, options, progress):
    """`gemma2 pick` at eta = 0.5 of the line from the SFT policy to the last slerp that was measured."""
    from gemma2.merging import MergeRequest, merge

    root = options.out.parent
    last = max(path for path in root.glob("iteration-*") if (path / "slerp").exists())
    request = MergeRequest(method="liti", models=(last / "slerp",), base=root.parent / "sft", etas=(0.5,))
    return RunResult(options.out, merge(request, out=options.out).summary)


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name, body in (("rlhf", rl), ("pareto", front), ("pick", choose)):
        known = COMMANDS[name]
        monkeypatch.setitem(COMMANDS, name, Stub(known.schema, "none", "none", "", known.makes, False, body))
    random = np.random.default_rng(0)
    save(tmp_path / "sft", {name: random.standard_normal(shape) for name, shape in SHAPES.items()})
    write_tokenizer(tmp_path / "sft")
    for name in ("prompts", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    return tmp_path


def warp(place: Path, **options):
    base = {"sft": place / "sft", "prompts": place / "prompts.jsonl", "heldout": place / "heldout.jsonl"}
    plain = {key: str(value) for key, value in base.items()}
    shape = {"reward_fn": ["json:dumps"], "policies": M, "iterations": I, "steps": T, "eta": ETA, "mu": MU, "seed": 7}
    return compiled({"w": {"command": "warp", "options": {**plain, **shape, **options}}}, place)


def check_equal(actual: dict, expected: dict, name: str) -> None:
    assert actual.keys() == expected.keys(), name
    for key in expected:
        np.testing.assert_allclose(actual[key], expected[key], rtol=3e-6, atol=3e-7, err_msg=f"{name}: {key}")


def test_every_tensor_is_that_of_the_transcription(place):
    before = (place / "sft" / "model.safetensors").read_bytes()
    run(warp(place))
    expected = algorithm_1(load(place / "sft"))
    assert len(expected) == I * (2 * M + 2) + 1
    for name, tensors in expected.items():
        check_equal(load(place / "w" / name), tensors, name)
    assert (place / "sft" / "model.safetensors").read_bytes() == before  # init is never changed in place


def test_the_transcription_would_show_the_usual_errors(place):
    """Merging anchors, a constant lambda, LITI towards the SFT policy: none of them gives these tensors."""
    sft = load(place / "sft")
    found = algorithm_1(sft)
    key = "model.layers.1.mlp.up_proj.weight"
    right = found["iteration-2/slerp"][key]
    init = found["iteration-1/init"]
    anchors = slerp(init, [found[f"iteration-2/policy-{m}/ema"] for m in (1, 2, 3)])
    assert np.abs(anchors[key] - right).max() > 1e-2
    towards_sft = line(sft, found["iteration-2/slerp"], ETA)
    assert np.abs(towards_sft[key] - found["iteration-2/init"][key]).max() > 1e-2
    group = [key]
    deltas = [{key: found[f"iteration-2/policy-{m}"][key] - init[key]} for m in (1, 2, 3)]
    constant = slerp_pair(slerp_pair(deltas[0], deltas[1], 0.5, group), deltas[2], 0.5, group)
    assert np.abs(init[key] + constant[key] - right).max() > 1e-2


def test_a_run_that_is_killed_and_continued_ends_with_the_same_weights(place):
    """An executor that loses its process before every third job."""

    class Dying(Inline):
        def start(self, job, wanted):
            super().start(job, wanted)
            if len(self.started) % 3 == 0:
                raise KeyboardInterrupt

    attempts = 0
    while True:
        attempts += 1
        try:
            run(warp(place), Dying())
        except KeyboardInterrupt:
            continue
        break
    assert attempts > 3
    check_equal(load(place / "w" / "model"), algorithm_1(load(place / "sft"))["model"], "model")


def test_patience_ends_the_iterations_and_the_front_is_of_those_that_ran(place):
    found = run(warp(place, iterations=4, patience=1))
    told = {name.removeprefix("w/"): status for name, status in found.items()}
    assert told["iteration-2/slerp"] == "complete"  # whose front is flat: nothing comes after it
    assert {told[f"iteration-{i}/{name}"] for i in (3, 4) for name in ("policy-1", "slerp", "init", "front")} == {
        "not needed"
    }
    assert told["front"] == told["model"] == "complete"
    assert json.loads((place / "w" / "front" / "front.json").read_text())["fronts"] == 2
    assert load(place / "w" / "model").keys() == SHAPES.keys()


def test_the_schemas_are_those_of_the_commands():
    assert (COMMANDS["rlhf"].schema, COMMANDS["pareto"].schema) == (RlhfConfig, ParetoConfig)


class Heard:
    """Collects the notes and warnings of a run."""

    def __init__(self):
        self.notes, self.warnings = [], []
        self.task, self.note, self.warn = SILENT.task, self.notes.append, self.warnings.append


def heard(pipeline):
    found = Heard()
    run_stages(pipeline, check_pipeline(pipeline), Inline(), progress=found)
    return found


def angle_in_blocks(place: Path) -> float:
    """Mean over blocks and pairs of the policies of iteration 1, in degrees."""
    sft = load(place / "sft")
    policies = [load(place / "w" / "iteration-1" / f"policy-{m}") for m in range(1, M + 1)]
    found = []
    for layer in ("layers.0.", "layers.1."):
        names = [name for name in SHAPES if layer in name]
        vectors = [np.concatenate([(one[k] - sft[k]).ravel() for k in names]) for one in policies]
        pairs = [(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]]
        found += [np.degrees(np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))) for a, b in pairs]
    return float(np.mean(found))


def test_the_angle_of_the_first_merge_and_its_noise_scale_are_stated_once(place):
    said = heard(warp(place, prompts_per_step=2, n=2))
    (line,) = [note for note in said.notes if "degrees apart" in note]
    angle = angle_in_blocks(place)
    assert line.startswith(f"w/iteration-1/slerp: task vectors are {angle:.1f} degrees apart in the blocks after 16 ")
    assert said.warnings == []  # the runs differ in their noise alone: about 90 degrees


def test_a_pipeline_is_warned_before_its_first_stage_and_not_again_when_the_runs_are_there(place):
    settings = {"prompts_per_step": 8, "n": 4, "noise_scale": 64}  # 4 steps, 128 completions: cos = 1 / 1.5
    said = heard(warp(place, **settings))
    (line,) = said.warnings
    assert line.startswith("stages.w: task vectors of iteration 1 are expected 48.2 degrees apart (128 completions ")
    assert check_pipeline(warp(place, **settings)).warnings == ()


def test_policies_that_share_a_direction_are_warned_of_after_their_merge(place, monkeypatch):
    monkeypatch.setitem(globals(), "gradient", lambda theta, anchor, seed, t: shared_gradient(theta, seed, t))
    said = heard(warp(place, prompts_per_step=2, n=2))
    (line,) = (one for one in said.warnings if one.startswith("w/iteration-1/slerp: task vectors are "))
    assert line.startswith(f"w/iteration-1/slerp: task vectors are {angle_in_blocks(place):.1f} degrees apart: the ")


def shared_gradient(theta: dict, seed: int, t: int) -> dict:
    """The same drift for every run, and half as much noise in each weight."""
    noise = np.random.default_rng([seed, t])
    return {k: 1.0 + 0.5 * noise.standard_normal(theta[k].shape) for k in theta}


def test_the_quickstart_is_not_warned_and_with_eight_times_the_completions_it_is(tmp_path):
    """Its SFT policy does not exist yet: the stages that make it start at the student of `gemma2 tiny`."""
    assert check_pipeline(quickstart_pipeline(tmp_path), contents=False).warnings == ()  # 240 completions: 79 degrees
    more = [f"stages.warp.options.{key}={value}" for key, value in (("prompts_per_step", 8), ("n", 4))]
    (line,) = check_pipeline(quickstart_pipeline(tmp_path, sets=more), contents=False).warnings
    assert line.startswith("stages.warp: task vectors of iteration 1 are expected 48.9 degrees apart (1,920 ")
    wide = [*more, "stages.models.options.width=192"]  # N was not measured there
    assert check_pipeline(quickstart_pipeline(tmp_path, sets=wide), contents=False).warnings == ()
