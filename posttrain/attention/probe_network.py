"""A small random network of a model's architecture, on which a soft cap, a window, padding and borders of rows matter.

On a small or an untrained model attention logits stay far below the cap, and a kernel that has dropped it differs from
eager by rounding only. So q_proj is scaled until the largest logit exceeds three times the cap. Head size, soft cap,
query scale and the ratio of query to key heads are those of the model; width, depth and vocabulary are small. The rows
are longer than two blocks of 128, in which flex attention skips what is masked, and longer than the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["LENGTH", "WINDOW", "ProbeRows", "probe_rows", "scale_queries", "small_network"]

VOCABULARY, WINDOW, LENGTH = 128, 144, 320  # rows of the embedding, tokens, tokens
WIDTH = 16  # of the network, for each query head
BORDER = 130  # where the second row of a packed pair begins
PAD = 60  # tokens of padding
OVER = 3.0  # how far the largest logit exceeds the cap
UNCAPPED = 12.0  # the largest logit of a model without a soft cap
KEPT: tuple[str, ...] = (
    *("model_type", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "hidden_activation"),
    *("hidden_act", "rms_norm_eps", "rope_theta", "attention_bias", "use_bidirectional_attention", "mlp_bias"),
)


class _Attends(Protocol):
    """The attention of a layer, as the architectures of transformers name its parts."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    head_dim: int
    num_key_value_groups: int
    scaling: float


@dataclass(frozen=True)
class ProbeRows:
    """A batch in one of the forms that commands use.

    ids        (B, T)
    present    (B, T) bool, where a row has tokens
    mask       (B, T) as transformers takes it, None for rows that are padded on the right and need none
    positions  (B, T), restarting where rows are packed; None: 0 .. T - 1
    alone      packed rows one by one, (1, T_i) each
    """

    ids: Tensor
    present: Tensor
    mask: Tensor | None = None
    positions: Tensor | None = None
    alone: tuple[Tensor, ...] = ()


def small_network(settings: Mapping[str, object]) -> PreTrainedModel:
    """Build the network of a model's config.json in fp32 on the CPU, eager attention; its weights are exact in bf16.

    The same settings give the same weights; torch's random state is left alone.
    """
    cap = cast("float | None", settings.get("attn_logit_softcapping"))
    config = AutoConfig.for_model(**_small(settings))
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for _, parameter in sorted(network.named_parameters()):
                parameter.normal_(0.0, 0.3)
    scale_queries(network, OVER * cap if cap else UNCAPPED, probe_rows()["right-padded"].ids)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return network


def _small(settings: Mapping[str, object]) -> dict[str, object]:
    heads = cast(int, settings.get("num_attention_heads") or 4)
    keys = cast(int, settings.get("num_key_value_heads") or heads)
    head = settings.get("head_dim") or cast(int, settings.get("hidden_size") or 256) // heads
    queries = 2 * max(1, heads // keys)
    found: dict[str, object] = {name: settings[name] for name in KEPT if name in settings} | {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH * queries,
        "intermediate_size": 2 * WIDTH * queries,
        "num_hidden_layers": 2,
        "num_attention_heads": queries,
        "num_key_value_heads": 2,
        "head_dim": head,
        "max_position_embeddings": 4 * LENGTH,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    if settings.get("sliding_window") and settings.get("use_sliding_window", True):
        found |= {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
    kinds = list(dict.fromkeys(cast("list[str]", settings.get("layer_types") or [])))
    if kinds:
        found["layer_types"] = [kinds[0], kinds[-1]]
    return found


def probe_rows() -> dict[str, ProbeRows]:
    """The forms of rows: right-padded without a mask (scoring), padded with one (training), packed (SFT)."""
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) * 37 % (VOCABULARY - 1) + 1
    right, both = torch.ones(2, LENGTH, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
    right[1, -PAD:] = both[1, -PAD:] = both[0, :PAD] = False
    row = ids[:1]
    restart = torch.cat([torch.arange(BORDER), torch.arange(LENGTH - BORDER)])[None]
    return {
        "right-padded": ProbeRows(ids, right),
        "padded on either side": ProbeRows(ids, both, both.long()),
        "packed": ProbeRows(
            row, right[:1], positions=restart, alone=(row[:, :BORDER].contiguous(), row[:, BORDER:].contiguous())
        ),
    }


@torch.no_grad()
def scale_queries(network: PreTrainedModel, wanted: float, ids: Tensor) -> None:
    """Scale q_proj of each layer so that its largest attention logit over `ids` (B, T), before the cap, is `wanted`."""
    for layer in network.base_model.layers:
        if not hasattr(layer.self_attn, "q_proj"):
            continue
        largest: list[float] = []
        hook = layer.self_attn.register_forward_hook(partial(_keep_largest, largest), with_kwargs=True)
        network(ids)
        hook.remove()
        layer.self_attn.q_proj.weight.mul_(wanted / largest[0])


def _keep_largest(
    into: list[float], module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor], out: object
) -> None:
    """Note the largest attention logit of a layer, without its rotary embedding, which keeps norms."""
    attention = cast(_Attends, module)
    states = arguments[0] if arguments else options["hidden_states"]
    shape = (*states.shape[:-1], -1, attention.head_dim)
    query = attention.q_proj(states).view(shape).transpose(1, 2)
    key = attention.k_proj(states).view(shape).transpose(1, 2)
    key = key.repeat_interleave(attention.num_key_value_groups, 1)
    into.append(float((query @ key.transpose(2, 3) * attention.scaling).abs().max()))
