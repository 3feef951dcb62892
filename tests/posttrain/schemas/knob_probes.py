"""What the consumers of a schema make of its fields: each probe runs one and returns what it did, to be compared.

A probe never returns the configuration: only what a function that reads it gave back, wrote, or was called with.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from chat_server import KEY, Server, refuse, serving
from samples import row

from gemma2.core.errors import Gemma2Error
from gemma2.core.progress import SILENT
from gemma2.core.ranks import ALONE
from gemma2.posttrain.provenance.named_inputs import named_inputs
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas.config import Config

Probe = Callable[[Any, "Room"], object]


@dataclass
class Room:
    """A folder with the files that probes read, the address of a server, and places for outputs."""

    root: Path
    url: str
    server: Server
    outputs: int = field(default=0)

    def out(self) -> RunOptions:
        """A fresh place for an output."""
        self.outputs += 1
        return RunOptions(self.root / f"out-{self.outputs}")

    def file(self, name: str) -> Path:
        return self.root / name


class Reached(BaseException):
    """Ends a command where what is to be seen has been seen."""


@contextmanager
def room(root: Path) -> Iterator[Room]:
    """The files and the server that the probes share."""
    write(root / "rows.jsonl", FILTERED)
    write(root / "other.jsonl", [row("Another answer, of another file.")])
    write(root / "many.jsonl", [{"prompt": f"What is {i}?"} for i in range(200)])
    write(root / "broken.jsonl", [row("Yes."), {"prompt": "no completion"}, row("No.")])
    write(
        root / "heldout.jsonl", [{"prompt": "Put in order the words that follow: zebra, lion, ape, and the elephant"}]
    )
    write(root / "prompts.jsonl", [{"prompt": f"What is {i}?", "question": f"Who is {i}?"} for i in range(4)])
    write(root / "prompts-2.jsonl", [{"prompt": f"Where is {i}?", "question": f"When is {i}?"} for i in range(4)])
    (root / "judge.txt").write_text("Rate {answer} to {prompt}. Score: N", encoding="utf-8")
    server = JudgingServer()
    # The server speaks plain HTTP; reading the certificates for each client is a tenth of the time.
    with serving(server) as url, patch.object(ssl.SSLContext, "load_verify_locations"):
        yield Room(root, url, server)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")


def seen(made: object) -> object:
    """Something that compares by its content."""
    if is_dataclass(made) and not isinstance(made, type):
        return {name: seen(value) for name, value in vars(made).items()}
    if isinstance(made, Mapping):
        return {str(key): seen(value) for key, value in made.items()}
    if isinstance(made, list | tuple):
        return [seen(item) for item in made]
    assert not isinstance(made, Config), "a probe returns what was made of a configuration, not itself"
    return made if isinstance(made, str | int | float | None | bytes) else str(made)


def outcome(function: Callable[..., object], *arguments: object) -> object:
    """What a call returns, or the error that it raises."""
    try:
        return function(*arguments)
    except Gemma2Error as error:
        return str(error)


def files(out: Path) -> dict[str, str]:
    """The files of an output but its manifest and card, which repeat the configuration."""
    return {
        str(path.relative_to(out)): path.read_text(encoding="utf-8")
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("gemma2.json", "README.md")
    }


# --- filter -----------------------------------------------------------------------------------------------------------


def prose(seed: str, words: int = 40) -> str:
    return " ".join(word(seed, i) for i in range(words))


def word(seed: str, number: int) -> str:
    """A word of letters alone: rows that differ in a digit are not near duplicates."""
    return f"{seed}{'abcdefghijklmnop'[number // 16]}{'abcdefghijklmnop'[number % 16]}"


LOOP = " ".join(["one two three four five six"] * 4 + [f"w{i}" for i in range(20)])  # two fifths are repeated
# Rows of which each option drops another set.
FILTERED = [
    row(""),
    row("It is so."),
    row("An answer without an end", "How does it end?"),
    row(prose("long", 200) + ".", "A long one?"),
    row(LOOP + ".", "Does it repeat itself?"),
    row("Das ist eine ziemlich lange Antwort auf Deutsch, die jeder versteht.", "Was ist das?"),
    row("Det er en kort sætning, som ligner norsk en del.", "Hvad er det?"),
    row("Ring mich an: 030 901820.", "Which number has Berlin?"),
    row("I am ChatGPT, a model.", "Who are you?"),
    row("As an AI language model I have a view on it.", "What do you think?"),
    row("What a load of shit.", "How was it?"),
    row("Shit, shit, what an asshole.", "How was he?"),
    row("He was a bloody murderer who will kill and behead you, you know.", "Who was he?"),
    row("I'm not sure.", "Is it so?"),
    row("As an AI language model I'm not sure about that at all.", "Is it really so?"),
    row("Order: ape, lion, zebra.", "Put in order the words that follow: zebra, lion, ape"),
    row(prose("same") + ".", "The first question?"),
    row(prose("same") + ".", "The first question?"),
    row(prose("same") + ".", "Quite another question, which was asked by somebody else?"),
    row(prose("same", 36) + " and something new.", "The first question?"),
    row(" ".join(word("same", i) for i in reversed(range(40))) + ".", "The first question?"),
    row("I am ChatGPT, jane.doe@gmail.com", "Who are you?", finish_reason="length"),
    *(row(f"I'm sorry, but I can't help with {i}.", f"Can you help with {i}?") for i in range(6)),
]


def filtered(config: Any, room: Room) -> object:
    """The shards, the dropped rows with their reasons, and the counts."""
    from gemma2.posttrain.filters import runner

    with light_runs(runner, room):
        return outcome(lambda: written(runner.run_filter(config, room.out())))


def reasons(config: Any, room: Room) -> object:
    """Whether some dropped row lists several reasons."""
    from gemma2.posttrain.filters import runner

    with light_runs(runner, room):
        out = runner.run_filter(config, room.out()).out
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    return any(len(one.get("reasons", ())) > 1 for one in dropped)


def filter_workers(config: Any, room: Room) -> object:
    """The number of processes that the scan is given."""
    from gemma2.posttrain.filters import runner

    with (
        light_runs(runner, room),
        patch.object(runner, "scanned", side_effect=Reached) as scanned,
        patch.object(runner, "CHUNK", 2),
    ):
        try:
            runner.run_filter(config, room.out())
        except Reached:
            return scanned.call_args.args[-1]
    return None


def safety(config: Any, room: Room) -> object:
    """The settings of the classifier, its directory included."""
    from gemma2.posttrain.filters import runner, safety

    network = SimpleNamespace(
        config=SimpleNamespace(id2label={0: "a", 1: "b"}, num_labels=2, problem_type="", max_position_embeddings=4096),
        to=lambda device: SimpleNamespace(eval=lambda: None),
    )
    loader = SimpleNamespace(
        from_pretrained=lambda path, **options: (paths.append(path), (network, {"missing_keys": []}))[1]
    )
    paths: list[Path] = []
    with (
        patch.object(safety, "AutoModelForSequenceClassification", loader),
        patch.object(safety, "load_tokenizer", lambda path: SimpleNamespace(model_max_length=4096)),
        patch.object(safety, "read_config", lambda path: {"architectures": ["BertForSequenceClassification"]}),
    ):
        model = runner._safety_model(config)
    judge = model._judge
    return paths, model.threshold, judge.unsafe, judge.length, judge.batch_size


def policy_judge(config: Any, room: Room) -> object:
    """The settings of a ShieldGemma-style model."""
    from gemma2.posttrain.filters import safety

    tokenizer = SimpleNamespace(encode=lambda word, add_special_tokens: [len(word)])
    with (
        patch.object(safety, "load_policy", lambda path, dtype: (path, tokenizer)),
        patch.object(safety, "read_config", lambda path: {}),
    ):
        model = safety.SafetyModel.load(config)
    judge: Any = model._judge
    return model.threshold, judge.model, judge.length, judge.batch_size


# --- generate, reward pairs -------------------------------------------------------------------------------------------


class JudgingServer(Server):
    """Answers with a score that depends on the whole request."""

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = super().completion(body)
        text = body["messages"][-1]["content"]
        found["choices"][0]["message"]["content"] = f"Score: {1 + sum(map(ord, text)) % 90 / 10}"
        return found


def asked(room: Room) -> list[object]:
    """The requests that the server has received since the last call, in an order of their own."""
    found = [[headers.get("authorization"), body] for _, headers, body in room.server.requests]
    room.server.requests.clear()
    room.server.answered.clear()
    return sorted(found, key=lambda one: json.dumps(one, sort_keys=True))


class Engine:
    """Stands for a loaded model: says what it was asked, with the settings that it was loaded with."""

    window, chunk = None, 8

    def __init__(self, *settings: object) -> None:
        self.settings = settings
        self.chat = None

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        return [1, 2, 3]

    def complete(self, requests: Any, known: Any) -> Iterator[list[Any]]:
        from gemma2.posttrain.generation.engines import Completion

        for request in requests:
            text = f"{request.messages} {request.seed}" + "!" * (request.seed % 7)
            yield [Completion(request.key, text, "stop", 7, 3, -1.5, [1, 2])]

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return None


def paired(config: Any, room: Room) -> object:
    """The pairs, the settings of the sampler and the requests to the judge's server."""
    from gemma2.posttrain.preferences import pairs

    loaded: list[object] = []
    with (
        patch.dict("os.environ", {"OPENAI_API_KEY": KEY, "VLLM_API_KEY": "sk-other", "OPENAI_BASE_URL": room.url}),
        light_runs(pairs, room),
        patch.object(
            pairs.SamplerEngine, "load", lambda *given, **more: (loaded.append(seen([given, more])), Engine())[1]
        ),
    ):
        made = outcome(lambda: written(pairs.run_pairs(config, room.out())))
    return made, loaded, asked(room)


def written(result: Any) -> object:
    return files(result.out), result.summary


def judge_client(config: Any, room: Room) -> object:
    """The address of the judge's server and how much it is asked at once."""
    from gemma2.posttrain.preferences.judge import judge_engine

    with patch.dict("os.environ", {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": room.url}):
        engine: Any = judge_engine(config, SILENT)
        found = engine.address, engine.chunk, engine.config.concurrency
        engine.close()
    return found


def generated(config: Any, room: Room) -> object:
    """The rows, their counts and the requests to the server."""
    from gemma2.posttrain.generation import generate

    with (
        patch.dict("os.environ", {"OPENAI_API_KEY": KEY, "VLLM_API_KEY": "sk-other", "OPENAI_BASE_URL": room.url}),
        light_runs(generate, room),
    ):
        made = outcome(lambda: written(generate.run_generate(config, room.out())))
    return made, asked(room)


def generated_with_long_prompts(config: Any, room: Room) -> object:
    """`generated` at a server that finds one prompt too long."""
    room.server.faults = lambda number, body: (
        refuse(400, "too long", code="context_length_exceeded") if "What is 2?" in str(body) else None
    )
    try:
        return generated(config, room)
    finally:
        room.server.faults = lambda number, body: None


def generated_at_a_failing_server(config: Any, room: Room) -> object:
    """How often a server is asked that always fails."""
    from gemma2.posttrain.generation.engines import server

    room.server.faults = lambda number, body: refuse(500)
    try:
        with patch.object(server.Backoff, "delay", lambda *_: 0.0):
            _, requests = generated(config, room)  # type: ignore[misc]
    finally:
        room.server.faults = lambda number, body: None
    return len(requests)


def server_client(config: Any, room: Room) -> object:
    """The settings of the connection to a server."""
    from gemma2.posttrain.generation.engines import load_engine

    with patch.dict("os.environ", {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": room.url}):
        engine: Any = load_engine(config, SILENT)
        found = engine.address, engine.chunk, engine.client.timeout
        engine.close()
    return found


def local_engine(config: Any, room: Room) -> object:
    """The engine, and the settings that our sampler is loaded with."""
    from gemma2.posttrain.generation.engines import load_engine, local, offline

    with (
        patch.object(local.SamplerEngine, "load", lambda *given: seen(given)),
        patch.object(offline.VllmEngine, "load", lambda config: "vLLM"),
    ):
        return load_engine(config, SILENT)


def budget(config: Any, room: Room) -> object:
    from gemma2.posttrain.runs.generation_budget import generate_budget

    return generate_budget(config)


# --- reward, sampling, evaluation -------------------------------------------------------------------------------------


def long_is_good(completions: list[str], **columns: object) -> list[float]:
    """A reward function."""
    return [float(len(text)) for text in completions]


def short_is_good(completions: list[str], **columns: object) -> list[float]:
    """A reward function."""
    return [-float(len(text)) for text in completions]


LONG, SHORT = "knob_probes:long_is_good", "knob_probes:short_is_good"


def sampled() -> Any:
    from gemma2.posttrain.rewards.functions import Sampled

    rows: Any = [SimpleNamespace(messages=[{"role": "user", "content": "Why?"}], where="f:1", extra={})] * 2
    return Sampled(rows, [[1], [1]], [[2, 3], [2, 3, 4, 5]], ["so", "so it is"], [False, True])


@contextmanager
def reward_models() -> Iterator[None]:
    """Reward models that are not read: one that is named 'a/b' gives a score of its own."""
    from gemma2.posttrain.rewards import terms

    def model(path: object, dtype: object, attention: str) -> object:
        given = sum(map(ord, f"{path} {dtype} {attention}"))

        def score(prompts: object, completions: list[list[int]], batch_size: int) -> Any:
            import torch

            return torch.tensor([float(given + len(ids) * batch_size) for ids in completions])

        return SimpleNamespace(reads=lambda tokenizer: True, score=score)

    with (
        patch.object(terms.RewardModel, "from_dir", model),
        patch.object(
            terms, "averaged_reward_model", lambda paths, dtype, kernel, _: model([*paths, "average"], dtype, kernel)
        ),
    ):
        yield


CHAT: Any = SimpleNamespace(tokenizer=None, check_prompt=lambda messages: None, normalise=lambda messages: None)


def rewarded(config: Any, room: Room) -> object:
    """The columns of the reward of two completions."""
    from gemma2.posttrain.rewards.terms import reward_score

    with reward_models():
        score = reward_score(config, CHAT, 4)
        return score(sampled()), seen([named.path for named in named_inputs(config)])


def measured(config: Any, room: Room) -> object:
    """How a policy would be drawn from and scored."""
    from gemma2.posttrain.evaluation.evaluate import scores_of, settings_of

    with reward_models():
        return seen(settings_of(config)), [score(sampled()) for score in scores_of(config, CHAT)]


def evaluated(config: Any, room: Room) -> object:
    """What `gemma2 eval` loads and measures; the measurement itself is left out."""
    from gemma2.posttrain.evaluation import evaluate

    loaded: list[object] = []

    def load(path: Path, dtype: object, attention: str) -> tuple[Any, None]:
        loaded.append((str(path), dtype, attention))
        return SimpleNamespace(name=str(path), generation_config=None), None

    with (
        patch.object(evaluate, "load_policy", load),
        patch.object(evaluate, "ChatFormat", lambda *_: CHAT),
        patch.object(evaluate, "check_same_vocabulary"),
        patch.object(evaluate, "measure", side_effect=Reached) as measure,
    ):
        try:
            evaluate.run_eval(config)
        except Reached:
            model, reference, _, rows, _, settings, *_ = measure.call_args.args
            return loaded, model.name, reference.name, [row.messages for row in rows], seen(settings)
    return None


def bench(config: Any, room: Room) -> object:
    """The prompts, models and settings of `gemma2 pareto`."""
    from gemma2.posttrain.evaluation import candidates, pareto

    def load(path: Path, dtype: object, attention: str) -> tuple[Any, None]:
        return SimpleNamespace(name=f"{path} {dtype} {attention}", generation_config=None), None

    with (
        patch.object(pareto, "load_policy", load),
        patch.object(pareto, "ChatFormat", lambda *_: CHAT),
        patch.object(candidates, "digest_weights", str),
    ):
        made = pareto.Bench(config, SILENT)
        planned = candidates.plan_candidates(config)
    return (
        [row.messages for row in made.rows],
        made.reference.name,
        len(made.scores),
        seen(made.settings),
        seen(planned),
    )


# --- training ---------------------------------------------------------------------------------------------------------


def open_run(room: Room) -> Any:
    return SimpleNamespace(
        checkpoints=room.root / "checkpoints",
        path=room.root,
        ranks=ALONE,
        origin={},
        memory=SimpleNamespace(holds={}, advice=None),
    )


def adapters(config: Any, room: Room) -> object:
    """peft's configuration."""
    from gemma2.posttrain.models.lora import lora_config

    made = lora_config(config, "CAUSAL_LM")
    return made and {key: str(value) for key, value in made.to_dict().items()}


def rl_arguments(config: Any, room: Room) -> object:
    """The options of TRL's trainer, and the samples of a step."""
    from gemma2.posttrain.rl.rlhf import local_rows, rloo_arguments

    rows, micro = local_rows(config, ALONE)
    return rows, micro, seen(rloo_arguments(config, open_run(room), rows, micro))


def rl_data(config: Any, room: Room) -> object:
    from gemma2.posttrain.data.reading import Reading
    from gemma2.posttrain.rl.rlhf import read_data

    return [[row.messages for row in side] for side in read_data(config, Reading(config))]


def rl_run(config: Any, room: Room) -> object:
    """What `gemma2 rlhf` sets up before the first step, in calls of the functions that build it."""
    from gemma2.posttrain.adapters import frozen_base
    from gemma2.posttrain.models.precision import HOST
    from gemma2.posttrain.rl import rlhf, setup

    calls: list[object] = []

    def note(name: str, result: object) -> Callable[..., object]:
        return lambda *given, **named: (calls.append([name, [known(item) for item in given]]), result)[1]

    network = SimpleNamespace(
        generation_config=None, requires_grad_=lambda flag: network, named_modules=lambda: [], device=HOST
    )
    silent = lambda callback: None  # noqa: E731
    trainer = SimpleNamespace(add_callback=silent, follow=note("follow", None), anchor=None, trained=network)
    with (
        patch.object(rlhf, "open_run", note("parents", nothing(open_run(room)))),
        patch.object(setup, "load_policy", note("load", (network, None))),
        patch.object(frozen_base, "load_policy", note("load", (network, None))),
        patch.object(setup, "check_targets"),
        patch.object(setup, "sharing_copy", lambda policy: network),
        patch.object(setup, "check_same_vocabulary"),
        patch.object(setup, "ChatFormat", lambda *_: CHAT),
        patch.object(setup, "reward_score", note("reward", None)),
        patch.object(setup, "Rollout", note("rollout", SimpleNamespace(policy=network, chat=CHAT, anchor=None))),
        patch.object(setup, "EmaAnchor", note("dense", None)),
        patch.object(setup, "LoraAnchor", note("products", None)),
        patch.object(setup, "FactorAnchor", note("factors", None)),
        patch.object(rlhf, "Guards", note("guards", None)),
        patch.object(rlhf, "AnchoredRlooTrainer", note("trainer", trainer)),
        patch.object(rlhf, "check_usable", note("vllm is needed", None)),
        patch.object(rlhf, "compare_attention", note("vllm's attention", None)),
        patch.object(rlhf, "drawing", side_effect=Reached),
        patch.object(rlhf.transformers, "set_seed", note("seed", None)),
    ):
        try:
            rlhf.run_rlhf(config, room.out())
        except Reached:
            return calls
    return None


def nothing(value: object) -> Any:
    """A context manager that gives this."""

    @contextmanager
    def block() -> Iterator[object]:
        yield value

    return block()


def known(item: object) -> object:
    """An argument of a call, where it has a content that can be compared."""
    if isinstance(item, str | int | float | Path | None):
        return str(item)
    if hasattr(item, "initial_seed"):
        return item.initial_seed()
    return type(item).__name__ if not isinstance(item, list | tuple) else [known(one) for one in item]


def distill_arguments(config: Any, room: Room) -> object:
    from gemma2.posttrain.distillation.distill import distillation_arguments

    return seen(distillation_arguments(config, open_run(room), config.micro_batch_size or config.batch_size))


def trained(config: Any, room: Room, *, module: str, trainer: str) -> object:
    """The options that TRL's trainer is built with."""
    from importlib import import_module

    from gemma2.posttrain.data.examples import Example

    home: Any = import_module(f"gemma2.posttrain.{module}")
    options_of = import_module("gemma2.posttrain.training.trainer")
    made: Any = SimpleNamespace(scores_targets_only=True, padding_free=False)
    with (
        patch.object(home, trainer, return_value=made) as built,
        patch.object(home, "check_targets"),
        patch.object(options_of, "check_recipe"),  # a batch that its micro-batches do not divide is refused before
        patch.object(home, "to_dataset", lambda rows: "plain"),
        patch.object(home, "total_steps", lambda trainer, rows: 100),
    ):
        if hasattr(home, "pack"):
            with patch.object(home, "pack", lambda rows, length: f"packed to {length}"):
                home.make_trainer(
                    None, SimpleNamespace(pad_token_id=0), [Example([1], [True])], config, open_run(room), 2
                )
        else:
            home.make_trainer(None, None, [], config, open_run(room), 2)
    options = built.call_args.kwargs
    adapter = options.pop("peft_config")
    parts = getattr(made, "part_tokens", None), adapter and str(sorted(adapter.to_dict().items(), key=str))
    return (
        seen(vars(options.pop("args"))),
        {name: str(value) for name, value in options.items() if name != "model"},
        parts,
    )


def sft_trainer(config: Any, room: Room) -> object:
    return trained(config, room, module="sft.sft_trainer", trainer="SftTrainer")


def reward_trainer(config: Any, room: Room) -> object:
    return trained(config, room, module="preferences.reward_trainer", trainer="PairTrainer")


def plan_of_heldout(config: Any, room: Room) -> object:
    """At which of ten steps the held-out loss is measured, what is kept, and when the run stops."""
    from gemma2.posttrain.training import heldout

    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0, 3.1, 3.2, 3.3])
    run = SimpleNamespace(log=lambda step, **figures: None, checkpoints=room.root / "none", ranks=ALONE)
    callback = heldout.HeldOut(run, [1], config)
    batches: set[int] = set()
    found: list[object] = []
    with (
        patch.object(heldout, "heldout_loss", lambda model, rows, size, ranks: (batches.add(size), next(losses))[1]),
        patch.object(heldout, "measuring", lambda model, what, ranks: nullcontext()),
        patch.object(heldout.HeldOut, "_save_best", lambda self, model: found.append("saved")),
    ):
        for step in range(1, 11):
            control = SimpleNamespace(should_training_stop=False, should_save=True)
            state = SimpleNamespace(global_step=step, max_steps=10)
            callback.on_step_end(None, state, control, model=None)
            found.append([callback.record.step, control.should_training_stop])
    return found, sorted(batches), callback.summary(SILENT)


# --- pipelines, merge, the rest ---------------------------------------------------------------------------------------


def warp(config: Any, room: Room) -> object:
    """The stages of WARP."""
    from gemma2.posttrain.pipelines.warp_stages import warp_stages

    return {name: stage.model_dump() for name, stage in warp_stages(config).items()}


def warning_of_warp(config: Any, room: Room) -> object:
    """The warning about the angle between the policies of a WARP run."""
    from gemma2.posttrain.checks.merging_gain import low_gain

    return low_gain(config, embedded=False)


def warp_run(config: Any, room: Room) -> object:
    """The executor of a WARP run."""
    from gemma2.posttrain.pipelines import warp

    with (
        patch.object(warp, "open_run", lambda *given, **named: nothing(SimpleNamespace(path=room.root))),
        patch.object(warp, "executor_of", side_effect=Reached) as executor,
    ):
        try:
            warp.run_warp(config, room.out())
        except Reached:
            return executor.call_args.args
    return None


def compiled(config: Any, room: Room) -> object:
    """The stages of a pipeline file."""
    from gemma2.posttrain.pipelines.compile import compile_pipeline

    made = compile_pipeline(config, Path("root"))
    return {
        name: seen(asdict(stage) | {"resources": stage.resources.model_dump()}) for name, stage in made.stages.items()
    }


def compiled_stage(config: Any, room: Room) -> object:
    from gemma2.posttrain.schemas import PipelineFile, StageFile

    before = StageFile(command="tiny")
    return compiled(PipelineFile(stages={"first": before, "it": config}), room)


def compiled_resources(config: Any, room: Room) -> object:
    from gemma2.posttrain.schemas import PipelineFile, StageFile

    stage = StageFile(command="sft", options={"model": "m", "data": ["d"]})
    shared = PipelineFile(stages={"a": stage}, resources=config)
    return compiled(shared, room), compiled_stage(stage.model_copy(update={"resources": config}), room)


def merged(config: Any, room: Room) -> object:
    """The merge as the engine takes it."""
    return seen(config.request())


def made_prompts(config: Any, room: Room) -> object:
    """The files of `gemma2 tiny` and the seed of its models, which are not trained."""
    from gemma2.posttrain.tiny import build

    seeds: list[int] = []
    with (
        light_runs(build, room),
        patch.object(build, "ensure_cached", lambda seed, progress: (seeds.append(seed), {})[1]),
    ):
        result = build.run_tiny(config, room.out())
    return seeds, files(result.out)


def scored_rows(config: Any, room: Room) -> object:
    """The rows that a reward model would score, the shards of `reward score`, and what the model is given."""
    from gemma2.posttrain.preferences import score

    given: list[object] = []

    def scores(model: Any, rows: list[list[int]], batch_size: int, ranks: object) -> object:
        import torch

        given.append([model.name, rows, batch_size])
        return torch.full((len(rows),), 0.5)

    def ids(chunk: list[Any], chat: object) -> list[list[int]]:
        return [[1] * 120 for row in chunk for _ in row.conversations]

    def load(path: Path, dtype: object, attention: str) -> object:
        name = f"{path} {dtype} {attention}"
        return SimpleNamespace(name=name, tokenizer=None, model=SimpleNamespace(config=SimpleNamespace()))

    with (
        patch.object(score.RewardModel, "from_dir", load),
        patch.object(score, "ChatFormat", lambda *_: CHAT),
        patch.object(score, "load_tokenizer", lambda *_: None),
        patch.object(score, "score_rows", scores),
        patch.object(score, "_ids", ids),
        light_runs(score, room),
    ):
        result = score.run_score(config, room.out())
    return given, files(result.out)


class LightRun:
    """A run without a manifest, whose inputs are neither digested nor looked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self.ranks = path, path / ".checkpoints", ALONE
        self.origin: dict[str, object] = {}
        path.mkdir()

    def finish(self, summary: dict[str, Any]) -> object:
        for file in self.checkpoints.glob("*"):  # what a resume would read
            file.unlink()
        return SimpleNamespace(out=self.path, summary=summary)


def light_runs(module: Any, room: Room) -> Any:
    """`open_run` of a module gives light runs."""
    return patch.object(module, "open_run", lambda *given, **named: nothing(LightRun(room.out().out)))
