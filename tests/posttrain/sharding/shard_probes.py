"""What two processes see of a sharded model: each function runs on every process and returns facts for a test."""

import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from gemma2.core.errors import InputError
from gemma2.core.ranks import Ranks
from gemma2.posttrain.models.decoder import StepDecoder
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.sharding.distributed_state import load_state, save_state
from gemma2.posttrain.sharding.into_shards import divide, skeleton
from gemma2.posttrain.sharding.lockstep import in_step
from gemma2.posttrain.sharding.units import gathered, layout_of, local, plain_class, whole, whole_head
from gemma2.posttrain.sharding.whole_files import save_sharded

IDS = torch.arange(20).view(2, 10) + 5


def ranks_here() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())


def divided(path: Path):
    model = skeleton(AutoModelForCausalLM, path)
    divide(model, path, layout_of(ranks_here(), torch.device("cpu")))
    return model


def all_shards(model) -> bool:
    return all(isinstance(value, DTensor) for value in model.parameters())


@torch.no_grad()
def weights(root: Path) -> dict:
    """Shards, whole weights and gathered ones next to those of the same model in one process."""
    alone, _ = load_policy(root / "policy")
    model = divided(root / "policy")
    expected = dict(alone.named_parameters())
    rank = dist.get_rank()
    facts = {
        "class": plain_class(model).__name__,
        "decodes": StepDecoder.fits(model),
        "shards": all_shards(model),
        "halves": sum(local(v).numel() for v in model.parameters()) / sum(v.numel() for v in alone.parameters()),
        "equal": all(torch.equal(v.full_tensor(), expected[n]) for n, v in model.named_parameters()),
    }
    before = model(input_ids=IDS).logits
    facts["shards after a forward pass"] = all_shards(model)
    with whole(model):
        facts["whole"] = all(torch.equal(v, expected[n]) for n, v in model.named_parameters())
        for _ in range(1 + rank):  # another number on each process: none of them communicates
            inside = model.base_model(input_ids=IDS).last_hidden_state
    facts["shards after whole"] = all_shards(model)
    with whole_head(model):
        head = model.get_output_embeddings().weight
        facts["whole head"] = not isinstance(head, DTensor) and torch.equal(head, expected["model.embed_tokens.weight"])
        facts["layers in shards"] = isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
        between = model.base_model(input_ids=IDS).last_hidden_state
    facts["shards after whole_head"] = all_shards(model)
    states = alone.base_model(input_ids=IDS).last_hidden_state
    facts["forward"] = [torch.equal(found, states) for found in (inside, between)]
    facts["forward"].append(torch.equal(before, alone(input_ids=IDS).logits))
    names = [name for name, _ in gathered(model)]
    facts["gathered once"] = sorted(names) == sorted(expected)
    return facts


def files(root: Path) -> dict:
    """A sharded model written as files, next to what `save_pretrained` writes of the whole one."""
    main, out = dist.get_rank() == 0, root / "plain"
    if main:
        out.mkdir()
        load_policy(root / "policy")[0].save_pretrained(root / "expected")
    model = divided(root / "policy")
    save_sharded(model, out, main)
    dist.barrier()
    if not main:
        return {}
    ours, theirs = load_file(out / "model.safetensors"), load_file(root / "expected/model.safetensors")
    return {
        "names": sorted(ours) == sorted(theirs),
        "values": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "dtypes": all(ours[name].dtype == theirs[name].dtype for name in theirs),
        "settings": [
            (out / name).read_text() == (root / "expected" / name).read_text()
            for name in ("config.json", "generation_config.json")
        ],
    }


def states(root: Path) -> dict:
    """Weights, moments and a further group saved, changed, and restored; the step after is the same."""
    model = divided(root / "policy")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def step() -> None:
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def everything() -> dict:
        return {name: value.detach().full_tensor().clone() for name, value in model.named_parameters()}

    step()
    kept, average = everything(), {name: value.data * 2 for name, value in model.named_parameters()}
    save_state(root / "saved", model, optimizer, {"anchor": average})
    step()
    then = everything()
    step()
    again = {name: torch.zeros_like(value) for name, value in average.items()}
    load_state(root / "saved", model, optimizer, {"anchor": again})
    facts = {
        "weights": all(torch.equal(value, kept[name]) for name, value in everything().items()),
        "further": all(torch.equal(local(value), local(average[name])) for name, value in again.items()),
    }
    step()
    facts["the step after"] = all(torch.equal(value, then[name]) for name, value in everything().items())
    with suppress(InputError):
        load_state(root / "nowhere", model, optimizer)
        facts["nowhere"] = "loaded"
    return facts


def refused(root: Path) -> dict:
    """The errors of weights that are missing, unknown, of another shape, not finite."""
    found = {}
    for fault in ("missing", "unknown", "shape", "nan"):
        broken = root / f"broken-{fault}"
        if dist.get_rank() == 0:
            shutil.copytree(root / "policy", broken)
            tensors = load_file(broken / "model.safetensors")
            name = "model.layers.1.mlp.up_proj.weight"
            if fault == "missing":
                del tensors[name]
            elif fault == "unknown":
                tensors["model.stranger"] = torch.zeros(2)
            elif fault == "shape":
                tensors[name] = tensors[name][:-1].clone()
            else:
                tensors[name][0, 0] = float("nan")  # in the part of rank 0 alone
            save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        dist.barrier()
        try:
            divided(broken)
        except InputError as error:
            found[fault] = str(error).replace(str(root), "")
    return found


def steps(root: Path) -> dict:
    """Batches of two processes, of which one has three and the other one, or none."""
    rank, ranks = dist.get_rank(), ranks_here()
    return {
        "uneven": list(in_step([1, 2, 3][: 3 - 2 * rank], ranks)),
        "none": list(in_step([1, 2][: 2 - 2 * rank], ranks)),
    }


PROBES = {"weights": weights, "files": files, "states": states, "refused": refused, "steps": steps}
