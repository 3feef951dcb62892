"""Run by torchrun: anchors on shards and the average of the gathered weights; rank 0 writes what it finds as JSON."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from gemma2.core.ranks import join
from gemma2.posttrain.models.lora import lora_config
from gemma2.posttrain.rl.sharded_anchor import ShardedAnchor, ShardedFactorAnchor, ShardedLoraAnchor
from gemma2.posttrain.schemas import RlhfConfig
from gemma2.posttrain.sharding.adapter_shards import adapted_shards, factors_of
from gemma2.posttrain.sharding.divided_models import divided_policy, empty_policy, read_shards
from gemma2.posttrain.sharding.lending import lend, opened, opened_heads
from gemma2.posttrain.sharding.units import layout_of, local

MU, STEPS = 0.1, 20


def whole(tensors):
    """The gathered values by name."""
    return {name: (value.full_tensor() if isinstance(value, DTensor) else value).clone() for name, value in tensors}


def move(policy, step):
    """Change what is trained as one process would: the same numbers for every division."""
    generator = torch.Generator().manual_seed(step)
    for value in policy.parameters():
        if value.requires_grad:
            change = 1e-3 * torch.randn(value.shape, generator=generator)
            size, offset = local(value.data).shape[0], 0
            if isinstance(value.data, DTensor):
                from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

                _, starts = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
                offset = starts[0]
            local(value.data).add_(change[offset : offset + size])


def anchored(kind, policy, path, layout):
    """(anchor, function that gives the averaged quantity of the policy, gathered)."""
    shell = empty_policy(path)
    if kind == "full":
        anchor = ShardedAnchor(read_shards(empty_policy(path), path, layout), shell, layout, torch.float32)
        return anchor, lambda: whole((name, value.data) for name, value in policy.named_parameters())
    if kind == "dense":
        return ShardedLoraAnchor(policy, shell, layout, torch.float32), lambda: whole(adapted_shards(policy))
    return ShardedFactorAnchor(policy, shell, layout, torch.float32), lambda: whole(factors_of(policy).items())


@torch.no_grad()
def averages(kind, path, layout):
    """Bit for bit the average of the gathered weights; its distance from the recursion in float64."""
    adapters = []

    def adapt(model):
        from peft import get_peft_model

        torch.manual_seed(0)
        fields = {"policy": path, "prompts": path, "lora_rank": 2}
        adapters.append(get_peft_model(model, lora_config(RlhfConfig(**fields), "CAUSAL_LM")))

    policy = divided_policy(path, layout, adapt=None if kind == "full" else adapt)
    anchor, theta = anchored(kind, policy, path, layout)
    plain = theta()
    exact = {name: value.double() for name, value in plain.items()}
    for step in range(STEPS):
        move(policy, step)
        anchor.update(policy, MU)
        for name, value in theta().items():
            plain[name].lerp_(value, MU)
            exact[name] = (1 - MU) * exact[name] + MU * value.double()
    found = whole(anchor.shadow.items())
    ids = torch.arange(12)[None] + 5
    with opened(anchor.model):
        logits = anchor.model(input_ids=ids).logits
        weights = {name: value.clone() for name, value in anchor.model.named_parameters()}
    result = {
        "equal": all(torch.equal(found[name], plain[name]) for name in plain) and found.keys() == plain.keys(),
        "error": max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact),
        "divided": all(isinstance(value, DTensor) for value in anchor.shadow.values()),
        "share": sum(local(value).numel() for value in anchor.shadow.values())
        / sum(value.numel() for value in anchor.shadow.values()),
        "scores": kind == "factors" or all(torch.equal(weights[name], value) for name, value in found.items()),
        "finite": bool(logits.isfinite().all()),
        "uneven": any(value.shape[0] % layout.shards for value in anchor.shadow.values()),
    }
    try:
        with torch.no_grad():
            anchor.shadow[next(iter(anchor.shadow))] = torch.zeros(1)
        anchor.update(policy, MU)
        result["refused"] = False
    except RuntimeError:
        result["refused"] = True
    return result


@torch.no_grad()
def lending(path, layout):
    """A lent model computes what a loaded one does, has no memory when closed, and its dtype is that of the loan."""
    from gemma2.posttrain.models.loading import load_policy

    shards = read_shards(empty_policy(path), path, layout)
    shell, half = empty_policy(path), empty_policy(path)
    lend(shell, lambda: iter(shards.items()), torch.float32, layout.device)
    lend(half, lambda: iter(shards.items()), torch.bfloat16, layout.device)
    loaded, _ = load_policy(path)
    narrow, _ = load_policy(path, torch.bfloat16)
    ids = torch.arange(12)[None] + 5
    held = lambda model: sum(v.untyped_storage().nbytes() for v in {id(p): p for p in model.parameters()}.values())  # noqa: E731
    with opened(shell, half):
        with opened(shell):  # stays open
            pass
        equal = torch.equal(shell(input_ids=ids).logits, loaded(input_ids=ids).logits)
        rounded = torch.equal(half(input_ids=ids).logits, narrow(input_ids=ids).logits)
        kinds = type(shell) is type(loaded) and half.dtype == torch.bfloat16
        tied = shell.lm_head.weight is shell.model.embed_tokens.weight
    with opened_heads(shell):
        head = torch.equal(shell.lm_head.weight, loaded.lm_head.weight)
        layers = sum(p.untyped_storage().nbytes() for layer in shell.model.layers for p in layer.parameters())
    parameters = len(list(shell.parameters()))
    return {
        "equal": equal, "rounded": rounded, "kinds": kinds, "tied": tied, "head": head, "whole": held(loaded),
        "closed": held(shell) / parameters, "layers": layers / parameters,
    }  # fmt: skip


def drawing_by_vllm(path, layout, ranks, mode):
    """The engine, or the server, has the weights that the shards hold now, adapters added; it draws from them."""
    import fake_vllm
    from accelerate import Accelerator
    from peft import get_peft_model
    from trl.generation import vllm_generation

    from gemma2.posttrain.data.chat import ChatFormat
    from gemma2.posttrain.models.loading import load_tokenizer
    from gemma2.posttrain.rl.sharded_setup import current_weights
    from gemma2.posttrain.rl.vllm import PlainWeights, VllmSampler

    for name in ("LLM", "SamplingParams"):
        setattr(vllm_generation, name, getattr(fake_vllm, name))
    vllm_generation.VLLMClient, vllm_generation.is_vllm_available = fake_vllm.Client, lambda: True
    fake_vllm.Client.model = str(path)
    fake_vllm.LLM.made.clear()
    settings = lora_config(RlhfConfig(policy=path, prompts=path, lora_rank=2), "CAUSAL_LM")
    policy = divided_policy(path, layout, adapt=lambda model: get_peft_model(model, settings))
    shell, tokenizer = empty_policy(path), load_tokenizer(path)
    lend(shell, lambda: current_weights(policy), torch.float32, layout.device)
    server = mode == "server"
    generation = PlainWeights(
        model=shell,
        accelerator=Accelerator(cpu=True),
        processing_class=tokenizer,
        mode=mode,
        server_base_url="http://localhost:8000" if server else None,
        tensor_parallel_size=1,
        max_num_seqs=4,
        max_completion_length=6,
        logprobs=None if server else 0,
        generation_kwargs={"stop_token_ids": [1, 107]},
    )
    chat = ChatFormat(tokenizer, shell.generation_config)
    sampler = VllmSampler(generation, shell, chat, torch.Generator().manual_seed(1), 4, ranks)
    found = []
    for step in range(2):
        move(policy, step)
        sampler.sync()
        drawn = sampler.draw([[2, 9, 8 + ranks.rank]], 2)
        theirs = ranks.gather([drawn.ids, [len(row) for row in drawn.logps]])
        expected = whole(current_weights(policy))
        engines = [dict(made.model.named_parameters()) for made in fake_vllm.LLM.made]
        same = all(torch.equal(engine[name], value) for engine in engines for name, value in expected.items())
        found.append({"same": same, "engines": len(engines), "drawn": theirs, "mismatch": sampler.mismatch})
    return found


if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = join("shards")
    layout = layout_of(ranks, torch.device("cpu"), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    found = {kind: averages(kind, folder / "policy", layout) for kind in ("full", "dense", "factors")}
    found["lending"] = lending(folder / "policy", layout)
    for mode in ("colocate", "server"):
        found[mode] = drawing_by_vllm(folder / "policy", layout, ranks, mode)
    every = ranks.gather(found)
    if ranks.is_main:
        out.write_text(json.dumps(every))
