"""Every attention kernel that can run here, against eager: with queries so large that the soft cap bites.

On small models logits stay far below the cap, and a back end that has dropped it differs from eager by rounding only.
The probe is a random network with the model's caps, query scale and heads, two layers (local, global), a window shorter
than its sequence, and q_proj scaled until the largest attention logit exceeds three times the cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma2.posttrain.attention.kernel_check import check_kernel
from gemma2.posttrain.attention.kernels import installed_kernels
from gemma2.posttrain.attention.probe_network import scale_queries
from gemma2.posttrain.models.causal_attention import blockwise
from gemma2.posttrain.models.loading import default_device

from .finding import Diagnosis, fine, problem, warning
from .subject import Subject

__all__ = ["ROWS", "WINDOW", "Deviation", "probe", "probe_attention", "probe_network", "probe_tokens"]

ROWS, WINDOW, LENGTH, WIDE = 128, 16, 48, 64  # vocabulary, window, tokens, hidden size of the probe
OVER = 3.0  # how far the largest logit exceeds the cap
BROKEN = "check the versions of torch and transformers, or report it"
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
    scale_queries(network, OVER * (cap or 50.0), probe_tokens())
    return network


def probe_tokens() -> Tensor:
    """The tokens (1, T) that the probe reads."""
    return torch.arange(LENGTH)[None] * 37 % ROWS


def backends() -> dict[str, Backend]:
    """This suite's own two."""
    return {"blockwise (training on a CPU)": _blockwise, "sampler (decoding)": _sampler}


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
    for name, run in (backends() if found is None else found).items():
        network = probe_network(cap, final, max(round(scale), 1), subject.number("head_dim") or 256).to(device)
        tokens = probe_tokens().to(device)
        wanted = network(tokens).logits.float()
        got = run(network, tokens)
        same = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
        results.append(Deviation(name, float((got - wanted).abs().max()), float(same)))
    return results


def probe_attention(subject: Subject) -> Iterator[Diagnosis]:
    """The answers of the check `attention`: our own two, then every kernel that can run here, as a training uses it."""
    for one in probe(subject):
        figures = f"{one.name}: logits within {one.largest:.1g} of eager, {one.agreement:.0%} of tokens equal"
        yield fine(figures) if one.right else problem(f"{figures}: it drops the soft cap or the window", BROKEN)
    device = default_device()
    for kernel in installed_kernels(device):
        try:
            check = check_kernel(subject.settings, kernel, "autocast", device, learns=True, packed=True)
        except Exception as error:  # a kernel raises whatever its compiler raises
            detail = " ".join(str(error).split())[:200]
            yield warning(f"{kernel} cannot run here: {detail}", "use --attention eager")
            continue
        line = f"{kernel}: {check.figures()}"
        yield fine(line) if check.right else problem(line, f"do not use {kernel}: --attention eager")
