"""Whether vLLM's attention has Gemma 2's soft cap and window, by a network on which both bite.

vLLM computes in bf16, whose rounding alone moves the log-probs of that network by 0.05 on average; without the cap they
move by 0.16, without the window by 0.6, without the final cap by 0.9. So the answer is the nearest of four references:
eager attention as it should be, and without each of the three. A right answer is remembered for this version of vLLM,
GPU and settings; a wrong one is found again.

Written to vLLM's documented interface; the tests run it on a stand-in with the same signatures (no GPU there).
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

from gemma2.core.errors import InputError
from gemma2.core.home import cache_folder
from gemma2.core.outputs.hashing import digest_name, hasher
from gemma2.core.progress import Progress

from .checks.attention_probe import ROWS, WINDOW, probe_network, probe_tokens
from .checks.subject import Subject

__all__ = ["NearestReference", "refuse_wrong_attention", "vllm_attention"]

RIGHT = "eager attention"
LENGTH = 64  # context of the engine, tokens
MEMORY = 0.1  # share of the GPU that the engine of the probe may take


@dataclass(frozen=True)
class NearestReference:
    """What vLLM's log-probs are nearest to.

    name       of the reference
    distances  mean difference of a log-prob from each reference, nats
    """

    name: str
    distances: Mapping[str, float]

    @property
    def right(self) -> bool:
        """Whether vLLM computes Gemma 2's attention."""
        return self.name == RIGHT

    def figures(self) -> str:
        """The distances in one line."""
        return ", ".join(f"{value:.2g} from {name}" for name, value in sorted(self.distances.items(), key=_second))


def _second(item: tuple[str, float]) -> float:
    return item[1]


def refuse_wrong_attention(path: Path, vllm: ModuleType, progress: Progress | None = None, dtype: str = "auto") -> None:
    """Raise InputError if vLLM drops a part of a Gemma 2's attention; `path` is the model's directory.

    dtype  that vLLM will run the model in; auto is bfloat16
    """
    subject = Subject(path)
    if not subject.is_gemma2:
        return
    dtype = "bfloat16" if dtype == "auto" else dtype
    known = _remembered(subject, vllm, dtype)
    if known.is_file():
        return
    if progress is not None:
        progress.note(f"comparing the attention of vLLM {vllm.__version__} with eager attention, once")
    found = vllm_attention(subject, vllm, dtype)
    if not found.right:
        raise InputError(
            f"vLLM {vllm.__version__} computes this model {found.name}: log-probs are {found.figures()}",
            "choose another back end of vLLM (--attention-backend), or another version of it",
        )
    with suppress(OSError):  # a cache that cannot be written costs the check again
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(dict(found.distances)) + "\n", encoding="utf-8")


def vllm_attention(subject: Subject, vllm: ModuleType, dtype: str = "bfloat16") -> NearestReference:
    """Run the probe of a model's settings in vLLM. Raises InputError if vLLM cannot run it."""
    settings = subject.settings
    scale = max(round(settings.get("query_pre_attn_scalar") or 256), 1)
    network = probe_network(
        settings.get("attn_logit_softcapping"),
        settings.get("final_logit_softcapping"),
        scale,
        subject.number("head_dim") or 256,
    )
    tokens = probe_tokens()
    with TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        got = _logps_of_vllm(vllm, folder, tokens[0].tolist(), dtype)
    distances = {
        name: float((reference[0, :-1].log_softmax(-1) - got).abs().mean())
        for name, reference in _references(network, tokens).items()
    }
    return NearestReference(min(distances.items(), key=_second)[0], distances)


@torch.no_grad()
def _references(network: Gemma2ForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
    """Logits as they should be, and without each part that a back end may drop. The network is changed."""
    found = {RIGHT: network(tokens).logits}
    attentions = [layer.self_attn for layer in network.model.layers]
    cap, final = network.config.attn_logit_softcapping, network.config.final_logit_softcapping
    if final is not None:
        network.config.final_logit_softcapping = None
        found["without the cap of the final logits"] = network(tokens).logits
        network.config.final_logit_softcapping = final
    if cap is not None:
        for attention in attentions:
            attention.attn_logit_softcapping = None
        found["without the soft cap of attention"] = network(tokens).logits
        for attention in attentions:
            attention.attn_logit_softcapping = cap
    network.config.sliding_window = 1000 * WINDOW
    for attention in attentions:
        attention.sliding_window = attention.sliding_window and 1000 * WINDOW
    found["without the sliding window"] = network(tokens).logits
    return found


def _logps_of_vllm(vllm: ModuleType, folder: str, ids: list[int], dtype: str) -> Tensor:
    """Log-probs (T - 1, rows) of every token after each prefix, by vLLM's offline interface."""
    try:
        llm = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=LENGTH,
            max_logprobs=ROWS,
            gpu_memory_utilization=MEMORY,
            enforce_eager=True,
            disable_log_stats=True,
            trust_remote_code=False,
            seed=0,
        )
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=ROWS, detokenize=False)
        (output,) = llm.generate([vllm.TokensPrompt(prompt_token_ids=ids)], [params], use_tqdm=False)
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise InputError(f"vLLM cannot run the attention probe: {detail}", "see vLLM's own log above") from error
    got = torch.full((len(ids) - 1, ROWS), float("-inf"))
    for position, row in enumerate(output.prompt_logprobs[1:]):
        for token, entry in row.items():
            got[position, token] = entry.logprob
    del llm, output
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return got


def _remembered(subject: Subject, vllm: ModuleType, dtype: str) -> Path:
    """The file that stands for a right answer."""
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "head_dim")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    chosen = os.environ.get("VLLM_ATTENTION_BACKEND", "")
    digest = hasher()
    digest.update(json.dumps([vllm.__version__, dtype, device, chosen, *map(subject.settings.get, keys)]).encode())
    return cache_folder("attention") / f"{digest_name(digest).rpartition(':')[2][:32]}.json"
