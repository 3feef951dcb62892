"""Every attention back end that is installed, against eager: with queries so large that the soft cap bites.

On small models logits stay far below the cap, and a back end that has dropped it differs from eager by rounding only.
The probe is a random network with the model's caps, query scale and heads, two layers (local, global), a window shorter
than its sequence, and q_proj scaled until the largest attention logit exceeds three times the cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from gemma2.posttrain.models.causal_attention import blockwise
from gemma2.posttrain.models.loading import default_device

from .finding import Diagnosis, fine, problem, warning
from .subject import Subject

__all__ = ["ROWS", "WINDOW", "Deviation", "probe", "probe_attention", "probe_network", "probe_tokens"]

ROWS, WINDOW, LENGTH, WIDE = 128, 16, 48, 64  # vocabulary, window, tokens, hidden size of the probe
OVER = 3.0  # how far the largest logit exceeds the cap
TOLERANCE = 2e-3  # of the logits, which the final cap bounds by 30; a dropped cap or window differs by more than 0.05
GREEDY = 12  # tokens
Backend = Callable[[Gemma2ForCausalLM, Tensor], Tensor]


@dataclass(frozen=True)
class Deviation:
    """A back end against eager.

    name        of the back end
    largest     difference of a logit
    agreement   share of positions whose most probable token is the same
    """

    name: str
    largest: float
    agreement: float

    @property
    def right(self) -> bool:
        """Whether it computes the same attention."""
        return self.largest <= TOLERANCE


def probe_network(cap: float | None, final_cap: float | None, scale: int, head: int) -> Gemma2ForCausalLM:
    """The random network, in fp32 on the CPU."""
    head = min(head, 64)
    config = Gemma2Config(
        vocab_size=ROWS,
        hidden_size=WIDE,
        intermediate_size=2 * WIDE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head,
        query_pre_attn_scalar=scale,
        sliding_window=WINDOW,
        attn_logit_softcapping=cap,
        final_logit_softcapping=final_cap,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Gemma2ForCausalLM = Gemma2ForCausalLM(config).eval()
        with torch.no_grad():
            for _, parameter in sorted(network.named_parameters()):
                parameter.normal_(0.0, 0.3)
    _scale_queries(network, OVER * (cap or 50.0))
    return network


@torch.no_grad()
def _scale_queries(network: Gemma2ForCausalLM, wanted: float) -> None:
    """Scale q_proj of each layer so that its largest attention logit, before the cap, is `wanted`."""
    for layer in network.model.layers:
        largest: list[float] = []
        hook = layer.self_attn.register_forward_hook(partial(_keep_largest, largest), with_kwargs=True)
        network(probe_tokens())
        hook.remove()
        layer.self_attn.q_proj.weight.mul_(wanted / largest[0])


def _keep_largest(
    into: list[float],
    module: Any,  # noqa: ANN401  # an attention of transformers
    arguments: tuple[Tensor, ...],
    options: dict[str, Tensor],
    out: object,
) -> None:
    """Note the largest attention logit of a layer, without its rotary embedding, which keeps norms."""
    states = arguments[0] if arguments else options["hidden_states"]
    shape = (*states.shape[:-1], -1, module.head_dim)
    query = module.q_proj(states).view(shape).transpose(1, 2)
    key = module.k_proj(states).view(shape).transpose(1, 2).repeat_interleave(module.num_key_value_groups, 1)
    into.append(float((query @ key.transpose(2, 3) * module.scaling).abs().max()))


def probe_tokens() -> Tensor:
    """The tokens (1, T) that the probe reads."""
    return torch.arange(LENGTH)[None] * 37 % ROWS


def backends(device: torch.device) -> dict[str, Backend]:
    """The back ends that can run here, by the name that --attention has, and this suite's two own."""
    found: dict[str, Backend] = {"blockwise (training on a CPU)": _blockwise, "sampler (decoding)": _sampler}
    if device.type != "cpu":
        found["flex_attention"] = partial(_named, "flex_attention")
        if is_flash_attn_2_available():
            found["flash_attention_2"] = partial(_named, "flash_attention_2")
        if is_flash_attn_3_available():
            found["flash_attention_3"] = partial(_named, "flash_attention_3")
    return found


def _named(name: str, network: Gemma2ForCausalLM, tokens: Tensor) -> Tensor:
    """A back end of transformers. Flash attention takes half precision only."""
    network.set_attn_implementation(name)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled="flash" in name):
        logits: Tensor = network(tokens).logits.float()
    return logits


def _blockwise(network: Gemma2ForCausalLM, tokens: Tensor) -> Tensor:
    with blockwise(network):
        logits: Tensor = network(tokens).logits
    return logits


def _sampler(network: Gemma2ForCausalLM, tokens: Tensor) -> Tensor:
    """Logits of the last positions from the sampler's own decoding: prompt first, then token by token."""
    from gemma2.posttrain.models.attention import additive, empty_cache, layer_masks

    cache = empty_cache(network.config)
    begin = LENGTH - GREEDY
    parts: list[Tensor] = []
    for start, stop in [(0, begin), *((at, at + 1) for at in range(begin, LENGTH))]:
        columns, rows = torch.arange(stop), torch.arange(start, stop)
        mask = additive((columns <= rows[:, None])[None, None], network.dtype).to(tokens.device)
        masks = layer_masks(network.config, mask)
        out = network(
            tokens[:, start:stop], position_ids=rows[None].to(tokens.device), attention_mask=masks,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        parts.append(out.logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def probe(
    subject: Subject, found: dict[str, Backend] | None = None, device: torch.device | None = None
) -> list[Deviation]:
    """Compare back ends with eager on the probe of a model's settings. Differences in logits, not in probabilities."""
    device = device or default_device()
    settings = subject.settings
    cap, final = settings.get("attn_logit_softcapping"), settings.get("final_logit_softcapping")
    scale = settings.get("query_pre_attn_scalar") or 256
    results = []
    for name, run in (backends(device) if found is None else found).items():
        network = probe_network(cap, final, max(round(scale), 1), subject.number("head_dim") or 256).to(device)
        tokens = probe_tokens().to(device)
        wanted = network(tokens).logits.float()
        got = run(network, tokens)
        same = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
        results.append(Deviation(name, float((got - wanted).abs().max()), float(same)))
    return results


def probe_attention(subject: Subject) -> Iterator[Diagnosis]:
    """The answers of the check `attention`."""
    for one in probe(subject):
        figures = f"{one.name}: logits within {one.largest:.1g} of eager, {one.agreement:.0%} of tokens equal"
        if one.right:
            yield fine(figures)
        elif "flash" in one.name and one.largest <= 0.5:
            yield warning(f"{figures} (bf16)", "use --attention eager to compare exactly")
        else:
            yield problem(
                f"{figures}: it drops the soft cap or the window", f"do not use {one.name}: --attention eager"
            )
