"""What only a GPU can show, part by part. Started by bench/gpu.sh; JSON is written after every figure.

    python bench/gpu_parts.py PART --size 2b|tiny --root DIR --out DIR

    models  random weights in the shape of Gemma 2 2B, a reward model and two policies to merge, written to DIR
    a  SFT: tokens per second and MFU, 16 and 32 thousand tokens a step, eager and flex attention
    b  RLHF, 16 prompts x 4 samples x 256 tokens: seconds per step, shares of phases, memory, plain TRL beside ours
    c  sampling, 64 rows x 256 tokens and one row: ours (graph; launched singly; row by row; graph of compiled blocks)
       and transformers' generate
    d  `gemma2 eval` of 64 prompts in fp32 and in bf16
    e  task-vector SLERP of two models on the same host, next to cp
    f  the peaks of a and b next to what the planner says

MFU: 6 N per token of the rows, N all weights with the embedding counted once (it is the head, its look-up is no
product); products of attention are not counted. Both denominators are given: the data sheet's rate and the rate of an
8192-wide product measured on this card. Sampling: bytes that a position must read (weights once, the KV cache of every
row at half of its final length) over the seconds of a position, as a share of both bandwidths.
`--size tiny` walks the same lines on a CPU: it shows that they run, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_card import ROUNDS, Figures, StepWatch, card, device, failure, peak_gb, start_peak, timed

COMPILED = ("generate, static cache", "gemma2, replayed, blocks compiled")
SHORT = 9  # tokens of a warm-up: one look of the host


def sizes(tiny: bool) -> dict[str, Any]:
    """How much of everything."""
    if tiny:
        return {"sft": [(2, 24), (2, 32)], "steps": 1, "rl": (2, 2, 8), "rows": 4, "new": 10, "prompt": 8, "eval": 4}
    return {"sft": [(16, 1024), (16, 2048)], "steps": 3, "rl": (16, 4, 256), "rows": 64, "new": 256, "prompt": 64,
            "eval": 64}  # fmt: skip


def models(options: argparse.Namespace, figures: Figures) -> None:
    """Random weights, drawn on the device: a CPU would take a minute for 2.6 G of them."""
    from rlhf import shape
    from shapes import layout, write_random
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2ForSequenceClassification, GenerationConfig

    from gemma2.posttrain.tiny.networks import tiny_tokenizer

    config = Gemma2Config(**shape(options.size), attn_implementation="eager", dtype="bfloat16")
    for name, kind in (("policy", Gemma2ForCausalLM), ("reward", Gemma2ForSequenceClassification)):
        begin = time.perf_counter()
        torch.manual_seed(len(name))
        if name == "reward":
            config.num_labels = 1
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device()):
            model = kind(config)
        torch.set_default_dtype(torch.float32)
        if name == "policy":
            model.generation_config = GenerationConfig(eos_token_id=[1, 107], bos_token_id=2, pad_token_id=0)
        else:
            model.config.pad_token_id = 0
        model.save_pretrained(options.root / name)
        tiny_tokenizer().save_pretrained(options.root / name)
        figures.add(name, parameters=sum(p.numel() for p in model.parameters()), seconds=time.perf_counter() - begin)
    prompts = [
        {"prompt": f"What is {i} and {i * 7 % 13}? Say it in a sentence."} for i in range(sizes(options.tiny)["eval"])
    ]
    (options.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    begin = time.perf_counter()
    for seed, name in enumerate(("base", "rl-1", "rl-2")):
        write_random(options.root / name, layout("2b", *((1, 512) if options.tiny else ())), seed)
    figures.add("three to merge", seconds=time.perf_counter() - begin)


def part_a(options: argparse.Namespace, figures: Figures) -> None:
    """SFT of the whole model, as `gemma2 sft` trains it."""
    for attention, (rows, tokens) in _sft_settings(options):
        what = f"SFT, {rows} x {tokens} tokens a step, {attention}"
        try:
            figures.add(what, **_sft(options, attention, rows, tokens))
        except Exception as error:  # the next setting may run: flex may not compile, eager may not fit
            traceback.print_exc()
            figures.add(what, failed=failure(error))


def _sft_settings(options: argparse.Namespace) -> list[tuple[str, tuple[int, int]]]:
    small, large = sizes(options.tiny)["sft"]
    if device().type == "cpu":  # flex has no backward pass there
        return [("eager", small), ("eager", large)]
    return [("eager", small), ("flex_attention", small), ("flex_attention", large)]


def _sft(options: argparse.Namespace, attention: str, rows: int, tokens: int) -> dict[str, Any]:
    import sft
    from transformers import PrinterCallback

    from gemma2.posttrain.data.examples import Example
    from gemma2.posttrain.models.loading import quiet_libraries

    quiet_libraries()
    start_peak()
    generator = torch.Generator().manual_seed(0)
    vocabulary, steps = 500 if options.tiny else 256_000, sizes(options.tiny)["steps"] + 2
    drawn = torch.randint(200, vocabulary, (rows * steps, tokens), generator=generator).tolist()
    examples = [Example(ids, [False] + [True] * (tokens - 1)) for ids in drawn]
    with tempfile.TemporaryDirectory(dir=options.root) as folder:
        fields = {"model": options.root / "policy", "root": Path(folder), "batch": rows, "micro_batch": None}
        given = argparse.Namespace(**fields, lora=False, attention=attention, gpu=device().type == "cuda")
        trainer = sft.ours(given, examples)
        trainer.remove_callback(PrinterCallback)
        watch = StepWatch(skipped=2)
        trainer.add_callback(watch)
        trainer.train()
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    seconds = statistics.median(watch.seconds)
    flops = 6 * count * rows * tokens / seconds
    found = {
        "tokens_per_second": rows * tokens / seconds,
        "seconds_of_steps": watch.seconds,
        "mfu_nominal": _share(flops, options.card["nominal_flops"]),
        "mfu_measured": _share(flops, options.card["measured_flops"]),
        "peak_gb": peak_gb(),
        "rows": rows,
        "tokens": tokens,
    }
    del trainer
    return found


def _share(value: float, of: float | None) -> float | None:
    return None if of is None else value / of


def part_b(options: argparse.Namespace, figures: Figures) -> None:
    """RLHF next to plain TRL, each in a separate process."""
    import rlhf

    prompts, samples, limit = sizes(options.tiny)["rl"]
    given = argparse.Namespace(
        size=options.size, prompts=prompts, samples=samples, limit=limit, steps=sizes(options.tiny)["steps"],
        rounds=1, trl_micro=None if options.tiny else 16, threads=4, lengths="full", gpu=True,
    )  # fmt: skip
    contenders = [("gemma2", "eager"), ("trl", "eager")]
    if device().type == "cuda":
        contenders.append(("gemma2", "flex_attention"))
    for name, attention in contenders:
        what = f"RLHF {prompts} x {samples} x {limit}, {name}, {attention}"
        try:
            found = rlhf.in_own_process(name, options.root, given, attention)
        except subprocess.CalledProcessError as error:
            figures.add(what, failed=f"exit code {error.returncode}, its last lines are in the log of this part")
            continue
        seconds = statistics.median(found["wall"])
        figures.add(
            what,
            seconds_per_step=seconds,
            seconds_of_steps=found["wall"],
            shares=found["shares"],
            sampling_seconds=seconds * found["shares"].get("draw", 0.0),
            peak_gb={"allocated": found["peak_mib"] * 2**20 / 1e9},
        )


def part_c(options: argparse.Namespace, figures: Figures) -> None:
    """Sampling alone, in bf16; the pairs of a workload take the same prompts and draw to the limit."""
    from gemma2.posttrain.models.loading import load_policy

    model = load_policy(options.root / "policy", torch.bfloat16)[0]
    size = sizes(options.tiny)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(108, 500, (size["rows"], size["prompt"]), generator=generator)
    workloads = {rows: ids[:rows].tolist() for rows in (size["rows"], 1)}
    for name in _samplers(model, workloads[1], 1):  # what may take long to compile comes last
        for rows, prompts in workloads.items():
            what = f"sampling, {rows} x {size['new']}, {name}"
            start_peak()
            try:
                # What is compiled is compiled for the shapes that it is measured with.
                _samplers(model, prompts, size["new"] if name in COMPILED else SHORT)[name]()
                seconds = timed(_samplers(model, prompts, size["new"])[name], 1 if options.tiny else ROUNDS)
            except Exception as error:  # a static cache and compiled blocks need a compiler
                traceback.print_exc()
                figures.add(what, failed=failure(error))
                continue
            figures.add(what, **_sampling(options, model, rows, statistics.median(seconds)), seconds=seconds)


def _sampling(options: argparse.Namespace, model: Any, rows: int, seconds: float) -> dict[str, Any]:
    size, config = sizes(options.tiny), model.config
    position = seconds / size["new"]
    weights = sum(parameter.numel() for parameter in model.parameters()) * 2
    columns = size["prompt"] + size["new"] / 2
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * columns * rows
    rate = (weights + cache) / position
    return {
        "tokens_per_second": rows * size["new"] / seconds,
        "ms_per_position": 1e3 * position,
        "bandwidth_nominal": _share(rate, options.card["nominal_bandwidth"]),
        "bandwidth_measured": _share(rate, options.card["measured_bandwidth"]),
        "peak_gb": peak_gb(),
    }


def _samplers(model: Any, prompts: list[list[int]], limit: int) -> dict[str, Callable[[], Any]]:
    """Ways to draw, by name."""
    from gemma2.posttrain.models import decoder_blocks, sampler
    from gemma2.posttrain.models.replayed.captured_step import capture_on

    params = sampler.SamplingParams(limit)

    def ours(fixed: bool, captured: bool) -> Callable[[], Any]:
        def work() -> Any:
            before = sampler.fixed_shapes, sampler.capture_on
            sampler.fixed_shapes = lambda device: fixed
            sampler.capture_on = capture_on if captured else lambda device: None
            try:
                return sampler.sample(model, prompts, params, [], 0, torch.Generator().manual_seed(0), len(prompts))
            finally:
                sampler.fixed_shapes, sampler.capture_on = before

        return work

    def compiled() -> Any:
        """The blocks by torch.compile, which joins the small kernels between the products."""
        plain = decoder_blocks.Layer.step
        backend = "inductor" if device().type == "cuda" else "aot_eager"
        decoder_blocks.Layer.step = torch.compile(plain, backend=backend, dynamic=False)
        try:
            return ours(fixed=True, captured=True)()
        finally:
            decoder_blocks.Layer.step = plain

    def generate(cache: str | None) -> Callable[[], Any]:
        ids = torch.tensor(prompts, device=model.device)
        fields = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": limit, "min_new_tokens": limit}
        more = {} if cache is None else {"cache_implementation": cache}
        mask = torch.ones_like(ids)
        return lambda: model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **fields, **more)

    return {
        "gemma2, as it is: replayed": ours(fixed=True, captured=True),
        "gemma2, fixed shapes, launched singly": ours(fixed=True, captured=False),
        "gemma2, row by row": ours(fixed=False, captured=False),
        "generate, dynamic cache": generate(None),
        COMPILED[0]: generate("static"),
        COMPILED[1]: compiled,
    }


def part_d(options: argparse.Namespace, figures: Figures) -> None:
    """The whole command, loading included, and the part of it that a second run shows to be fixed."""
    new = sizes(options.tiny)["new"]
    for dtype in ("float32", "bfloat16"):
        line = ["eval", "--model", "policy", "--sft", "policy", "--prompts", "prompts.jsonl", "--reward", "reward",
                "--dtype", dtype, "--max-new-tokens", str(min(new, 64))]  # fmt: skip
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "gemma2.cli.main", *line], cwd=options.root, check=False, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - begin
        failed = {} if done.returncode == 0 else {"failed": f"exit code {done.returncode}"}
        figures.add(f"eval of {sizes(options.tiny)['eval']} prompts, {dtype}", seconds=seconds, **failed)


def part_e(options: argparse.Namespace, figures: Figures) -> None:
    """The merge of bench/merge.py, on this host's processors and memory."""
    import merge

    figures.add("host", cpus=os.cpu_count(), on=str(options.root))
    for name, job in (("cp + fsync", lambda: merge.copy(options.root)),
                      ("slerp", lambda: merge.run_job(options.root, merge.JOBS["slerp"]))):  # fmt: skip
        runs = [job() for _ in range(3)]
        figures.add(name, **{key: statistics.median(run[key] for run in runs) for key in runs[0]})


def part_f(options: argparse.Namespace, figures: Figures) -> None:
    """Peaks that a and b have written, next to the planner's."""
    from gemma2.posttrain.planning.memory import Lengths, MemoryPlace, memory_of
    from gemma2.posttrain.planning.shapes import shape_of
    from gemma2.posttrain.schemas import RlhfConfig, SftConfig

    policy = options.root / "policy"
    place = MemoryPlace("accelerator" if device().type == "cuda" else "cpu")
    prompts, samples, limit = sizes(options.tiny)["rl"]
    for row in _rows_of(options.out / "a.json"):
        attention = row["what"].rpartition(", ")[2]
        config = SftConfig(model=policy, data=policy, batch_size=row["rows"], attention=attention)
        _beside(figures, row, memory_of(config, shape_of, place, Lengths(row=row["tokens"])))
    for row in _rows_of(options.out / "b.json"):
        if ", gemma2, " in row["what"]:
            given = {"policy": policy, "reward": (options.root / "reward",), "prompts": policy}
            config = RlhfConfig(**given, n=samples, prompts_per_step=prompts, max_new_tokens=limit)
            # bench/rlhf.py measures no KL to a reference, and its prompts are short.
            _beside(figures, row, memory_of(config, shape_of, place, Lengths(prompt=64)), without=("reference",))


def _rows_of(path: Path) -> list[dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if "failed" not in row]


def _beside(figures: Figures, row: dict[str, Any], plan: Any, without: tuple[str, ...] = ()) -> None:
    """A measured peak next to the plan's: on a GPU of tensors alone, which is what torch counts as allocated."""
    libraries = ("library baseline", "allocator slack", "rows and records") if device().type == "cuda" else ()
    phases = {
        phase.name: {part.name: part.bytes / 1e9 for part in phase.parts if part.name not in (*libraries, *without)}
        for phase in plan.phases
    }
    name, parts = max(phases.items(), key=lambda one: sum(one[1].values()))
    planned, measured = sum(parts.values()), row["peak_gb"]["allocated"]
    values = {"planned_gb": planned, "measured_gb": measured, "planned_over_measured": planned / measured}
    figures.add(row["what"], **values, phase=name, parts=parts)


PARTS = {"models": models, "a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", choices=["2b", "tiny"], default="2b")
    parser.add_argument("--root", type=Path, required=True, help="where the models are")
    parser.add_argument("--out", type=Path, required=True, help="where PART.json is written")
    options = parser.parse_args()
    options.tiny = options.size == "tiny"
    known = options.out / "models.json"
    options.card = json.loads(known.read_text())["card"] if options.part != "models" else card(options.tiny)
    figures = Figures(options.out / f"{options.part}.json", options.part, options.card)
    PARTS[options.part](options, figures)
    figures.done()


if __name__ == "__main__":
    main()
