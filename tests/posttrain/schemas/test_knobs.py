"""Every field of every schema reaches the place where it is used: cut one, and the test of that field fails.

Two parts. By its source: the places that read the field, found by the types of its annotations (`field_reads.py`), are
those of the table `field_reads.txt`; a read that was replaced by a constant is missing there, also where another object
has an attribute of that name. By its effect, for the fields of `CASES`: what is made of a configuration with the field
(`knob_probes.py`) differs from what is made of the one with its default. A field without a case is read by a run
alone: the models, the data and the steps of a training, of a scoring or of a conversion. For these the first part is
enough, and the tests of their rooms show the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import knob_probes as probes
import pytest
from field_reads import frozen, table

from gemma2.posttrain import schemas
from gemma2.posttrain.schemas.config import Config

SCHEMAS: dict[str, type[Config]] = {name: getattr(schemas, name) for name in schemas.__all__}
KNOBS = [f"{name}.{key}" for name, schema in SCHEMAS.items() for key in schema.model_fields]
# Reads here are about a configuration, they do not act on it: estimates, checks of inputs, messages, the manifest.
BOOKKEEPING = ("cli", "posttrain.planning.estimates", "posttrain.runs.inputs", "posttrain.provenance")
BOOKKEEPING += ("posttrain.pipelines.expected_outputs", "posttrain.pipelines.check", "posttrain.runs.commands")
# Fields that nothing reads but the manifest.
UNREAD = {"DistillCacheConfig.seed"}


def kin(schema: type[Config]) -> set[str]:
    """A schema, its bases and the schemas below it, by name: a read of any of them may be one of its fields."""
    return {base.__name__ for base in schema.__mro__} | {
        other.__name__ for other in SCHEMAS.values() if issubclass(other, schema)
    }


def places(knob: str, found: dict[str, int]) -> dict[str, int]:
    """The lines of a table that are about a field, or about a property of its schema that reads it."""
    name, _, key = knob.partition(".")
    names = {f"{other}.{key}" for other in kin(SCHEMAS[name])}
    mine = {line: count for line, count in found.items() if line.split()[0] in names}
    for line in list(mine):
        _, _, (home, member) = (*line.split()[0].partition(".")[:2], line.split()[1].rpartition(".")[::2])
        if "posttrain.schemas." in home and member not in SCHEMAS[name].model_fields:
            through = {f"{other}.{member}" for other in kin(SCHEMAS[name])}
            mine |= {line: count for line, count in found.items() if line.split()[0] in through}
    return mine


# --- the effect -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`probe` sees another thing with `after` than with `before`, which differ in one field; `given` is in both."""

    probe: probes.Probe
    after: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)


def cases(schema: str, probe: Callable[..., object], given: dict[str, Any] | None = None, **values: Any) -> None:
    """A case for each field: its value, or `with_(value, others that both configurations have)`."""
    for name, value in values.items():
        value, others = value if isinstance(value, With) else (value, {})
        case = Case(probe, {name: value}, {**(given or {}), **others})
        CASES.setdefault(f"{schema}.{name}", []).append(case)


class With(tuple[Any, dict[str, Any]]):
    """A value, and what else both configurations have."""


def with_(value: Any, **others: Any) -> With:
    return With((value, others))


CASES: dict[str, list[Case]] = {}
REQUIRED: dict[str, Any] = {
    "model": "m", "data": "{root}/rows.jsonl", "prompts": "{root}/prompts.jsonl", "teacher": "t", "sft": "s",
    "heldout": "{root}/prompts-2.jsonl", "policy": "p", "judge": "openai:a/judge", "front": "f", "source": "x",
    "command": "sft", "stages": {"a": {"command": "tiny"}}, "method": "slerp", "models": ("a", "b"),
    "base": "o", "tokenizer": "d",
}  # fmt: skip

cases(
    "FilterConfig",
    probes.filtered,
    {"workers": 1},
    data="{root}/other.jsonl",
    filters=("empty",),
    skip=("empty",),
    keep=with_(("hedging",), min_words=4),
    keep_patterns=with_({"sure": "not sure"}, min_words=4),
    require_ending=True,
    min_words=4,
    max_words=100,
    min_chars=15,
    max_chars=400,
    max_repetition=0.1,
    language=("de",),
    language_confidence=with_(1.0, language=("de", "en")),
    phone_region="DE",
    identity=("ChatGPT",),
    drop_disclaimers=True,
    unsafe_words=("slurs",),
    unsafe_terms=with_(2, unsafe_words=("general",)),
    decontaminate=("{root}/heldout.jsonl",),
    decontaminate_ngram=with_(5, decontaminate=("{root}/heldout.jsonl",)),
    dedup_on="prompt",
    near_threshold=0.95,
    shingle_words=1,
    max_refusal_share=0.1,
    all_reasons=True,
    on_bad_row=with_("skip", data="{root}/broken.jsonl"),
    shard_rows=3,
    seed=with_(7, max_refusal_share=0.2),
    safety_model=with_("nowhere"),
)
cases("FilterConfig", probes.filtered, {"workers": 1}, language=with_(("de",), before=("en",)))
cases("FilterConfig", probes.filter_workers, workers=3)
cases("FilterConfig", probes.reasons, {"workers": 1}, all_reasons=True)
safety = {"safety_model": "other", "safety_threshold": 0.25, "safety_max_length": 99, "batch_size": 5}
cases("FilterConfig", probes.safety, {"safety_model": "guard", "safety_labels": ("b",)}, **safety)
cases("FilterConfig", probes.policy_judge, {"safety_model": "guard"}, **safety)
cases("FilterConfig", probes.safety, {"safety_model": "guard"}, safety_labels=with_(("a",), before=("b",)))

cases(
    "PairsConfig",
    probes.paired,
    {"n": 2},
    model="other",
    prompts="{root}/prompts-2.jsonl",
    temperature=0.5,
    max_new_tokens=7,
    batch_size=5,
    judge="openai:another/judge",
    judge_prompt="{root}/judge.txt",
    judge_style="compare",
    judge_tokens=17,
    judge_key_env="VLLM_API_KEY",
    judge_request={"presence_penalty": 0.5},
    n=3,
    select=with_("all", n=4),
    min_margin=6.0,
    limit=2,
    seed=5,
)
cases("PairsConfig", probes.judge_client, judge_url="http://127.0.0.1:9/v1", judge_concurrency=3)

openai = {"engine": "openai"}
cases(
    "GenerateConfig",
    probes.generated,
    openai,
    teacher="other",
    prompts="{root}/prompts-2.jsonl",
    system="Be brief.",
    n=2,
    best=with_(1, n=2, reward_fn=(probes.LONG,)),
    turns=2,
    user_instruction=with_("Go on asking.", turns=2),
    temperature=0.5,
    max_new_tokens=300,
    top_p=0.5,
    top_k=3,
    keep_truncated=with_(True, max_new_tokens=4),
    shard_rows=2,
    limit=2,
    seed=5,
    api_key_env="VLLM_API_KEY",
    logprobs=True,
    request={"presence_penalty": 0.5},
    reward_fn=(probes.SHORT,),
)
cases("GenerateConfig", probes.generated_with_long_prompts, openai, on_overlong="drop")
cases("GenerateConfig", probes.generated_at_a_failing_server, {**openai, "concurrency": 1}, retries=1)
cases("GenerateConfig", probes.server_client, openai, base_url="http://127.0.0.1:9/v1", concurrency=3, timeout=9.0)
cases(
    "GenerateConfig",
    probes.local_engine,
    engine="vllm",
    teacher="other",
    temperature=0.5,
    max_new_tokens=7,
    top_p=0.5,
    top_k=3,
    batch_size=5,
)
for probe in (probes.generated, probes.budget):
    cases("GenerateConfig", probe, {**openai, "price_in": 1e3, "price_out": 1e3}, price_in=5e3, price_out=5e3)
cases("GenerateConfig", probes.budget, n=2, turns=2, user_instruction=with_("Go on.", turns=2), max_new_tokens=7)

cases(
    "RewardFields",
    probes.rewarded,
    {"reward_fn": (probes.LONG,)},
    reward=("a/b",),
    reward_fn=(probes.SHORT,),
    reward_weights=(0.5,),
    reward_clip=3.0,
    length_penalty=0.25,
    missing_eos_penalty=2.0,
)
cases("RewardFields", probes.rewarded, {"reward": ("a/b", "c/d")}, reward_ensemble="warm")
cases("RewardFields", probes.rewarded, {"reward": ("a/b", "c/d")}, reward_ensemble="min")

rewarded = {"reward_fn": (probes.LONG,)}
sampling: dict[str, Any] = {"temperature": 0.5, "max_new_tokens": 7, "batch_size": 5, "n": 3, "seed": 5}
cases("DistributionConfig", probes.measured, rewarded, **sampling, judge_fn=probes.SHORT)
cases("DistributionConfig", probes.measured, {"reward": ("a/b",)}, batch_size=5)
cases(
    "EvalConfig", probes.evaluated, rewarded, **sampling, model="other", sft="other", limit=2,
    prompts="{root}/prompts-2.jsonl",
)  # fmt: skip
front = {"policies": ("p",), "merged": "merged"}
cases(
    "ParetoConfig", probes.bench, {**rewarded, **front}, **sampling, limit=2, sft="other", judge_fn=probes.SHORT,
    prompts="{root}/prompts-2.jsonl", policies=("q",), init="begin", merged="end", etas=(0.0, 0.7),
)  # fmt: skip

lora: dict[str, Any] = {"lora_alpha": 3.0, "lora_targets": ("q_proj",)}
cases("LoraFields", probes.adapters, lora_rank=4)
cases("LoraFields", probes.adapters, {"lora_rank": 4}, **lora)
cases("LoraFields", probes.adapters, {"lora_rank": 4}, lora_dropout=0.5)
training: dict[str, Any] = {
    "learning_rate": 0.5, "warmup_steps": 7, "max_grad_norm": 9.0, "save_every": 7, "log_every": 7, "seed": 5,
    "trainer": {"adam_beta1": 0.5},
}  # fmt: skip
cases(
    "RlhfConfig", probes.rl_arguments, rewarded, **training, steps=7, n=3, max_new_tokens=7, temperature=0.5,
    prompts_per_step=8, micro_batch_size=16,
)  # fmt: skip
split = {"prompts": "{root}/many.jsonl"}
cases("RlhfConfig", probes.rl_data, prompts="{root}/many.jsonl", heldout="{root}/prompts-2.jsonl")
cases("RlhfConfig", probes.rl_data, {"heldout": "{root}/many.jsonl"}, eval_prompts=2)
cases("RlhfConfig", probes.rl_data, split, seed=5, eval_prompts=2)
cases(
    "RlhfConfig", probes.rl_run, rewarded, policy="other", sft="other", anchor="sft", mu=0.5, anchor_memory="cpu",
    max_kl=7.0, max_dead_steps=7, engine="vllm", lora_rank=4, seed=5, micro_batch_size=16,
    lora_anchor=with_("factors", lora_rank=4), ema_every=7,
)  # fmt: skip
distill = {"teacher": "t", "prompts": "p"}
cases(
    "DistillConfig", probes.distill_arguments, distill, **training, steps=7, batch_size=8, micro_batch_size=8,
    max_new_tokens=7, temperature=0.5,
)  # fmt: skip
rows = {"epochs": 3.0, "max_steps": 7, "batch_size": 32}
cases("SftConfig", probes.sft_trainer, **training, **rows, micro_batch_tokens=64, lora_rank=4)
packed = {"attention": "flash_attention_2"}
cases("SftConfig", probes.sft_trainer, packed, packing=True)
cases("SftConfig", probes.sft_trainer, {**packed, "packing": True}, max_length=99)
cases("RewardConfig", probes.reward_trainer, **training, **rows, center_coefficient=0.5, dropout=0.5, lora_rank=4)
for schema in ("SftConfig", "RewardConfig"):
    cases(
        schema, probes.plan_of_heldout, {"eval_every": 2}, eval_every=3, keep="best", patience=2, batch_size=5,
        micro_batch_size=5,
    )  # fmt: skip

cases(
    "WarpConfig", probes.warp, {**rewarded, "steps": (9,)}, **training, report_to=("tensorboard",), sft="other",
    prompts="other", heldout="other", policies=3, iterations=3, steps=(8,), eta=0.7, etas=(0.0, 0.7),
    vary=("beta=0.1:0.2",), patience=2, judge_fn=probes.SHORT, compare=("c",), eval_n=3, eval_limit=9, pick="eta=0.5",
    reference=(9.0, 0.5),
    cpus=3, reward=("a",), reward_fn=(probes.SHORT,), reward_weights=(2.0,), reward_clip=3.0, length_penalty=0.25,
    missing_eos_penalty=2.0, engine="vllm", prompts_per_step=8, n=3, beta=0.5, anchor="sft", mu=0.5,
    anchor_memory="cpu", temperature=0.5, max_new_tokens=7, micro_batch_size=16, eval_every=7, eval_prompts=7,
    max_kl=7.0, max_dead_steps=7, lora_rank=4, lora_alpha=with_(3.0, lora_rank=4),
    lora_targets=with_(("q_proj",), lora_rank=4), lora_anchor=with_("factors", lora_rank=4),
    reward_ensemble=with_("min", reward=("a", "b")),
    ema_every=7, vllm_seeds=with_("request", engine="vllm"),
    vllm_mode=None, vllm_memory=with_(0.5, engine="vllm"), vllm_tensor_parallel=with_(2, engine="vllm"),
    vllm_server_url=with_("http://b/", engine="vllm", vllm_mode="server", before="http://a/"),
)  # fmt: skip
del CASES["WarpConfig.vllm_mode"]  # goes with an address, so both would differ
cases("WarpConfig", probes.warp_run, jobs=3, executor="ray")
cases("WarpConfig", probes.warning_of_warp, noise_scale=1.0)

cases("MergeConfig", probes.merged, models=("a", "c"), base="init", tokenizer="union", dtype="float16")
cases("MergeConfig", probes.merged, chat_template="2", generation_config="2", special_tokens="2")
cases("MergeConfig", probes.merged, {"base": "init"}, granularity="tensor", t=0.25, method="multislerp")
cases("MergeConfig", probes.merged, {"method": "passthrough", "models": ("a",)}, scale=2.0)
cases("MergeConfig", probes.merged, {"method": "liti", "models": ("a",), "base": "init"}, eta=0.25)
cases("MergeConfig", probes.merged, {"method": "ema"}, decay=with_(0.25, before=0.5))
cases("MergeConfig", probes.merged, {"base": "init"}, uniform=True)  # with a method that needs neither it nor a decay
cases("MergeConfig", probes.merged, {"method": "karcher"}, iterations=7, tolerance=0.25, weights=(0.25, 0.75))
cases("MergeConfig", probes.merged, {"method": "breadcrumbs", "base": "init"}, gamma=0.25)
cases(
    "MergeConfig", probes.merged, {"method": "della", "base": "init"}, density=0.25, epsilon=0.125, normalize=True,
    rescale=False, seed=5,
)  # fmt: skip
cases("MergeConfig", probes.merged, {"method": "sce", "base": "init"}, select=0.25)
cases("MergeConfig", probes.merged, {"method": "ram-plus", "base": "init"}, threshold=0.25, boost=0.5, cap=0.75)
cases("MergeConfig", probes.merged, {"method": "nearswap", "models": ("a",), "base": "init"}, reach=0.25)
cases("MergeConfig", probes.merged, {"method": "nuslerp-rows"}, columns=True)
cases(
    "ExtractLoraConfig", probes.merged, {"rank": 2}, model="other", base="init", rank=3, explained=0.5,
    target_modules=("q_proj",), save_modules=("all",), leave_out=True, dtype="bfloat16",
)  # fmt: skip
slices = ({"sources": [{"model": "a", "layers": [0, 1]}]},)
cases("MergeConfig", probes.merged, {"method": "passthrough", "models": ("a",)}, slices=slices)
stages: dict[str, Any] = {"a": {"command": "sft", "options": {"model": "${vars.x}"}}}
cases("PipelineFile", probes.compiled, {"stages": stages, "vars": {"x": "m"}}, vars={"x": "other"})
cases("PipelineFile", probes.compiled, resources={"cpus": 3}, stages={"b": {"command": "tiny"}})
cases(
    "StageFile", probes.compiled_stage, command="convert", options={"model": "m"}, matrix={"seed": (1, 2)},
    after=("first",), when="${first.summary.x} < 1", retries=2, resources={"cpus": 3},
)  # fmt: skip
cases("Resources", probes.compiled_resources, cpus=3, gpus=2)
cases("TinyConfig", probes.made_prompts, train_prompts=9, heldout_prompts=9, width=64, seed=5)
cases(
    "RewardScoreConfig", probes.scored_rows, data="{root}/other.jsonl", model="other", column="mine", max_length=99,
    batch_size=5, shard_rows=3, limit=2,
)  # fmt: skip


def cases_of(knob: str) -> Iterator[Case]:
    """The cases of a field: its schema's own, or those of the nearest base."""
    name, _, key = knob.partition(".")
    for base in SCHEMAS[name].__mro__:
        if f"{base.__name__}.{key}" in CASES:
            yield from CASES[f"{base.__name__}.{key}"]
            return


# What a schema needs besides its required fields.
NEEDED: dict[str, dict[str, Any]] = {"DistillConfig": {"teacher": "t", "prompts": "p"}}
# RL refuses every dropout, so that no other value can arrive.
REFUSED = {f"{schema}.lora_dropout" for schema in ("RlFields", "RlhfConfig", "WarpConfig")}


def configured(schema: type[Config], given: dict[str, Any], room: probes.Room) -> Config:
    """A configuration with the required fields, paths below the room's folder."""
    needed = {name: REQUIRED[name] for name, item in schema.model_fields.items() if item.is_required()}
    needed |= NEEDED.get(schema.__name__, {})

    def placed(value: Any) -> Any:
        if isinstance(value, str) and "{root}" in value:
            return value.replace("{root}", str(room.root))
        return tuple(map(placed, value)) if isinstance(value, tuple) else value

    return schema.model_validate({name: placed(value) for name, value in {**needed, **given}.items()})


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[probes.Room]:
    with probes.room(tmp_path_factory.mktemp("knobs")) as made:
        yield made


@pytest.fixture(scope="module")
def remembered() -> dict[str, object]:
    """What probes saw of configurations that several fields are compared with."""
    return {}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_field_reaches_the_place_where_it_is_used(knob, room, remembered):
    agreed, found = places(knob, frozen()), places(knob, table())
    lost = {line: f"{found.get(line, 0)} of {count}" for line, count in agreed.items() if found.get(line, 0) < count}
    assert lost == {}, "if this is meant: python tests/posttrain/schemas/field_reads.py"
    tried = [] if knob in REFUSED else list(cases_of(knob))
    used = [line for line in found if not line.split()[1].startswith(BOOKKEEPING)]
    assert bool(used or tried) != (knob in UNREAD), "nothing reads it, or UNREAD is out of date"
    schema = SCHEMAS[knob.partition(".")[0]]
    key = knob.partition(".")[2]
    for case in tried:
        given = dict(case.given)
        if "before" in given:
            given[key] = given.pop("before")
        if key == "lora_rank" and "learning_rate" in schema.model_fields:
            given.setdefault("learning_rate", 1e-3)  # its default depends on the rank
        before, after = configured(schema, given, room), configured(schema, {**given, **case.after}, room)
        assert [name for name in schema.model_fields if getattr(before, name) != getattr(after, name)] == [key]
        name = f"{case.probe.__name__} {before!r}"
        if name not in remembered:
            remembered[name] = case.probe(before, room)
            assert case.probe(before, room) == remembered[name], "a probe that sees a difference everywhere shows none"
        assert case.probe(after, room) != remembered[name], f"{case.probe.__name__} sees no difference"


def test_the_table_lists_every_place():
    assert table() == frozen(), "if this is meant: python tests/posttrain/schemas/field_reads.py"
