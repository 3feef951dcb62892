"""vLLM as the sampler of RL, through TRL's VLLMGeneration: in this process (colocate) or at a server.

    y ~ mu(. | x), mu the policy as vLLM computes it;   log pi(y | x) from our own forward, at the sampling temperature

The policy's weights are copied to vLLM whenever they have changed (`sync`); prompts go there as token ids, and the
completion comes back with its stop token if one was drawn: without one it is truncated.

vLLM's kernels are others and it keeps its own dtype, so its log-probs differ from ours in the third digit or so: they
are not used. log pi comes from `token_logps`, as the anchor's side does, so that equal weights have a KL of exactly 0
and the KL in the reward is that of the policy that is trained. What is left is that the samples come from mu and not
from pi. TRL's RLOOTrainer does the same and leaves it there; its GRPOTrainer weighs the loss by a truncated pi / mu
(vllm_importance_sampling_correction). We do not correct it either, but show it: `mismatch`, mean log mu - log pi per
token, an estimate of KL(mu || pi). A run stops if it is far above rounding, because vLLM then computes another model.

Deviations from TRL: (1) samples are drawn from the run's generator: runs of different seeds differ, and a resumed run
goes on with the seeds it would have had. TRL sends none. `--vllm-seeds batch` seeds torch before all samples of a step
are drawn in this process; `request` gives each completion its own seed, for which vLLM draws row by row. One seed for
all requests would give the n samples of a prompt the same text. A server gets a seed for each request. vLLM repeats
itself only approximately, since a row's last bits depend on its neighbours: with it a resumed run is no longer bit-
exact. (2) LoRA products are added to weights on their way to vLLM and not in the policy: taken off again there, they
would leave rounding in weights that are frozen, and that the reference and the anchor share.

TRL 1.16 is written for vLLM 0.22 to 0.31. There was neither vLLM nor a GPU where this was written: the tests run TRL's
own class over a stand-in for vLLM with the same interface.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from gemma2.core.errors import GuardStop, InputError, UsageError
from gemma2.core.json_files import JsonObject
from gemma2.core.outputs.safetensors_header import printable
from gemma2.core.progress import Progress
from gemma2.core.ranks import ALONE, Ranks
from gemma2.core.secret_text import masked
from gemma2.posttrain.data.chat import ChatFormat
from gemma2.posttrain.doctor.vllm_probe import refuse_wrong_attention
from gemma2.posttrain.models.loading import default_device
from gemma2.posttrain.models.lora import adapted_weights
from gemma2.posttrain.models.protocols import CausalLM
from gemma2.posttrain.models.sampler import Completions
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.quantisation.convert import quantised_layers
from gemma2.posttrain.schemas import RlFields, RlhfConfig, VllmFields
from gemma2.posttrain.sharding.lending import is_lent, lent_weights, opened

__all__ = ["VllmSampler", "check_usable", "compare_attention"]

# TRL sets these for vLLM. If they stayed, the next run of this process (WARP) would believe that a launcher started it.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
REQUESTS = 64  # at a server at once
ANOTHER_MODEL = 0.5  # nats per token between vLLM's log-probs and ours; rounding to bf16 gives about a hundredth


class VllmSampler:
    """Draws completions of a policy that is being trained. Of several processes each draws for its own prompts.

    mismatch: mean log mu - log pi over the tokens of the last draw, nats; None where the server does not tell.
    """

    def __init__(
        self,
        generation: Any,  # noqa: ANN401
        policy: CausalLM,
        chat: ChatFormat,
        generator: torch.Generator,
        batch_size: int,
        ranks: Ranks = ALONE,
        each_request: bool = True,
    ) -> None:
        self.generation = generation
        self.policy = policy
        self.stop_ids = frozenset(chat.stop_ids)
        self.generator = generator
        self.batch_size = batch_size
        self.ranks = ranks
        self.mismatch: float | None = None
        # Gradients of adapters alone are reduced so fast that NCCL still clears its channels when the products of
        # vLLM's tensor parallelism begin, which hangs (trl#3671). TRL waits there only for a policy in peft's wrapper.
        adapted = any(hasattr(module, "lora_A") for module in policy.modules()) or is_lent(policy)
        self.drains = generation.mode == "colocate" and generation.tensor_parallel_size > 1 and adapted
        self._synced = False
        self._environment: dict[str, str | None] = {}
        self._seeds = _Seeds()
        if generation.mode == "server":
            if ranks.is_main:
                generation.vllm_client = _SeededClient(generation.vllm_client, self._seeds)
        else:
            generation.llm = _SeededLLM(generation.llm, self._seeds, each_request)

    @classmethod
    def start(
        cls,
        config: RlFields,
        policy: CausalLM,
        accelerator: Any,  # noqa: ANN401
        chat: ChatFormat,
        generator: torch.Generator,
        batch_size: int,
        ranks: Ranks = ALONE,
    ) -> VllmSampler:
        """Start vLLM next to the policy, or connect to the server.

        policy: the causal LM in training with adapters in its layers if it has any, or the one that a sharded policy
        lends its weights to.
        generator: the same on every process, and all the state there is.
        Raises UsageError where vLLM or a GPU is missing or the processes do not divide, InputError where vLLM or the
        server refuses.
        """
        check_usable(config, accelerator.device, ranks)
        environment = {name: os.environ.get(name) for name in LAUNCHER}
        rows = config.prompts_per_step // ranks.size * config.n
        try:
            generation = PlainWeights(
                model=policy,
                accelerator=accelerator,
                processing_class=chat.tokenizer,
                mode=config.vllm_mode,
                server_base_url=config.vllm_server_url,
                tensor_parallel_size=config.vllm_tensor_parallel,
                gpu_memory_utilization=config.vllm_memory,
                max_model_length=config.vllm_max_model_len,
                enable_sleep_mode=config.vllm_sleep_mode,
                max_num_seqs=rows * config.vllm_tensor_parallel,
                model_impl="vllm",
                temperature=config.temperature,
                max_completion_length=config.max_new_tokens,
                # A server gives raw log-probs unless it was configured otherwise; ours are at the sampling temperature.
                logprobs=0 if config.vllm_mode == "colocate" else None,
                generation_kwargs={"stop_token_ids": list(chat.stop_ids)},
            )
        except (ValueError, RuntimeError, OSError) as error:
            _restore(environment)
            detail = " ".join(str(error).split())[:200]
            raise InputError(f"--engine vllm does not start: {detail}", "see vLLM's own log above") from error
        each = config.vllm_seeds == "request"
        sampler = cls(generation, policy, chat, generator, batch_size, ranks, each)
        sampler._environment = environment
        return sampler

    def sync(self) -> None:
        """Copy the policy's weights to vLLM: before the first draw, and after every optimizer step and resume."""
        self.generation.sync_weights()
        self._synced = True

    def draw(self, prompts: Sequence[Sequence[int]], n: int) -> Completions:
        """n completions for each prompt (token ids), prompt-major, with log pi of our own forward.

        Raises GuardStop where vLLM's log-probs are not those of the policy.
        """
        if not self._synced:
            raise RuntimeError("vLLM has not been given the policy's weights: call sync() first")
        slots = [list(prompt) for prompt in prompts for _ in range(n)]
        if self.drains:
            torch.distributed.barrier()
        self._seeds.renew(self.generator, self._first_slot(len(slots)))
        _, drawn, theirs, _ = self.generation.generate(prompts=slots, images=None, num_generations=n)
        ids = [list(completion) for completion in drawn]
        with opened(self.policy):
            logps = token_logps(self.policy, slots, ids, self.batch_size, self.generation.temperature)
        self.mismatch = _mismatch(theirs, logps)
        if self.mismatch is not None and not abs(self.mismatch) < ANOTHER_MODEL:
            raise GuardStop(
                f"vLLM's log-probs differ from the policy's by {self.mismatch:.3g} nats per token, nothing was updated",
                "vLLM computes another model: check its version, or use --engine transformers",
            )
        return Completions(
            ids=ids,
            logps=[values.tolist() for values in logps],
            truncated=[completion[-1] not in self.stop_ids for completion in ids],
            prompt_index=[slot // n for slot in range(len(slots))],
        )

    def close(self) -> None:
        """Leave the server's weight-update group, or let go of vLLM and its memory."""
        if self.generation.mode == "server":
            if self.ranks.is_main:
                self.generation.vllm_client.close_communicator()
        else:
            self.generation.llm = None
        _restore(self._environment)

    def _first_slot(self, rows: int) -> int:
        """The position of the first completion of this process among the completions of all processes."""
        if self.generation.mode == "server":
            return 0  # rank 0 asks for everyone
        group = self.generation.tensor_parallel_size
        result: int = self.ranks.rank // group * group * rows
        return result


class PlainWeights(VLLMGeneration):  # type: ignore[misc]  # the library is not typed
    """TRL's generation, given the weights of a plain model: of one with adapters, or of one that is divided.

    TRL's own walk through a sharded model takes each parameter for a shard, and ends where a forward pass has left one
    whole; here `lending.py` gathers them. For a server they are all gathered, into memory of the host of rank 0, before
    the first is sent: while rank 0 waits for the server, the others would wait for it in the next gather.
    """

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if is_lent(self.model):
            yield from self._gathered()
            return
        packed = {f"{name}.weight": layer for name, layer in quantised_layers(cast(nn.Module, self.model))}
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name and not name.endswith(".base_layer.weight"):
                value = packed[name].dequantised() if name in packed else parameter.data
                yield name.replace(".base_layer.", "."), value
        yield from adapted_weights(self.model)

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        if self.mode == "colocate":
            yield from lent_weights(self.model)  # each process loads a tensor before the next is gathered
            return
        main = self.accelerator.is_main_process
        held = [(name, value.cpu() if main else value.new_empty(0)) for name, value in lent_weights(self.model)]
        self.accelerator.wait_for_everyone()
        device = self.accelerator.device
        while held:
            name, value = held.pop(0)
            yield name, value.to(device) if main else value


def check_usable(config: VllmFields, device: torch.device, ranks: Ranks) -> None:
    """Refuse what TRL would refuse late or with a traceback."""
    if not is_vllm_available():
        raise UsageError(
            "--engine vllm: the package vllm is not installed", "pip install 'gemma2[vllm]' on a machine with a GPU"
        )
    if device.type == "cpu":
        raise UsageError("--engine vllm needs a GPU, and this machine has none", "use --engine transformers")
    if ranks.size % config.vllm_tensor_parallel:
        raise UsageError(
            f"--vllm-tensor-parallel {config.vllm_tensor_parallel} does not divide the {ranks.size} processes",
            "start a multiple of it with torchrun",
        )


def compare_attention(config: RlhfConfig, ranks: Ranks, progress: Progress) -> None:
    """Run doctor's probe on this machine's vLLM before a model is loaded; a server's vLLM is out of its reach.

    Raises InputError where it drops the soft cap or the window of a Gemma 2.
    """
    if config.vllm_mode == "server":
        progress.note("the server's attention is not compared here: gemma2 serve compares it where it starts")
        return
    environment = {name: os.environ.pop(name, None) for name in LAUNCHER}  # the probe is one process
    try:
        ranks.on_main(lambda: refuse_wrong_attention(config.policy, import_module("vllm"), progress))
    finally:
        _restore(environment)


def _restore(environment: Mapping[str, str | None]) -> None:
    """Set environment variables back to their former values; None removes one."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _mismatch(theirs: Any, ours: Sequence[Tensor]) -> float | None:  # noqa: ANN401
    """Mean of log mu - log pi over all tokens, nats. theirs: as TRL gives them, (N, tokens, 1), or None."""
    if theirs is None:
        return None
    flat = torch.tensor([token[0] for completion in theirs for token in completion], dtype=torch.float64)
    return float((flat - torch.cat(list(ours)).double()).mean())


class _Seeds:
    """The seeds of one draw: `first`, first + 1, ..."""

    def __init__(self) -> None:
        self.first = 0

    def renew(self, generator: torch.Generator, skipped: int) -> None:
        """Draw new seeds; the first `skipped` belong to other processes."""
        self.first = int(torch.randint(2**62, (), generator=generator)) + skipped


class _SeededLLM:
    """vLLM's LLM in this process, each request with its own seed, or torch seeded before a batch and put back after it.

    Processes that hold one copy of the policy together get the same seeds, as vLLM needs it.
    """

    def __init__(self, llm: Any, seeds: _Seeds, each: bool) -> None:  # noqa: ANN401
        self._llm = llm
        self._seeds = seeds
        self._each = each

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._llm, name)

    def generate(self, prompts: Sequence[object], sampling_params: Any, **options: object) -> Any:  # noqa: ANN401
        if self._each:
            each = [copy.copy(sampling_params) for _ in prompts]
            for number, params in enumerate(each):
                params.seed = self._seeds.first + number
            return self._llm.generate(prompts, sampling_params=each, **options)
        device = default_device()
        on_cpu = device.type == "cpu"
        places = [] if on_cpu else [torch.accelerator.current_device_index()]
        with torch.random.fork_rng(places, device_type="cuda" if on_cpu else device.type):
            torch.manual_seed(self._seeds.first)
            return self._llm.generate(prompts, sampling_params=sampling_params, **options)


class _Reply(Protocol):
    """What is read of an answer of `requests`."""

    is_redirect: bool
    headers: Mapping[str, str]


def _stay(response: _Reply, **_: object) -> None:
    """Refuse a redirect before it is followed."""
    if response.is_redirect:
        place = printable(masked(response.headers["location"]))
        raise InputError(
            f"--vllm-server-url redirects to {place}, which would read the prompts", "give that address if you trust it"
        )


class _SeededClient:
    """TRL's client of a server, a request per prompt: the k-th of its n completions has the request's seed plus k."""

    def __init__(self, client: Any, seeds: _Seeds) -> None:  # noqa: ANN401
        self._client = client
        self._seeds = seeds
        session = getattr(client, "session", None)
        if session is not None:  # requests would send prompts and weights again, wherever a 307 or 308 leads
            session.hooks["response"].append(_stay)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._client, name)

    def generate(self, prompts: Sequence[list[int]], n: int, generation_kwargs: JsonObject, **options: object) -> Any:  # noqa: ANN401
        def ask(number: int) -> JsonObject:
            own = generation_kwargs | {"seed": self._seeds.first + number * n}
            result: JsonObject = self._client.generate(prompts=[prompts[number]], n=n, generation_kwargs=own, **options)
            return result

        with ThreadPoolExecutor(max_workers=min(REQUESTS, len(prompts))) as pool:
            answers = list(pool.map(ask, range(len(prompts))))
        found: JsonObject = {}
        for name in answers[0]:
            parts = [answer[name] for answer in answers]
            found[name] = None if parts[0] is None else [item for part in parts for item in part]
        return found
