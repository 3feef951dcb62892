"""The model card of an output: README.md with the metadata that the hub reads. Pure: facts in, text out.

    front matter   base_model, base_model_relation, library_name, pipeline_tag, tags, license, language
                   (https://huggingface.co/docs/hub/model-cards, "Model card metadata")
    text           kind of model, figures, how to load it, lineage, how it was made, limits

The card states only known facts: a licence or language is inherited from the cards of the parent models if all of them
state the same. It holds no path of this machine: models and files are named. The same run gives the same bytes: it
holds no times. Text from files is put in code spans and fences, or escaped, so that it cannot break the Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2.core.json_files import JsonMapping, JsonObject

from .manifest import DataRecord
from .markdown import code, escaped, fenced, shown, table, without_paths
from .safetensors_header import printable

__all__ = ["CARRIERS", "GEMMA", "GEMMAS", "Account", "Ancestor", "Facts", "metadata", "model_card"]

ADAPTED = "adapter-base"  # role of the model below a merged adapter (merging/plan/places.py)
# Roles whose weights are part of the result.
MADE_FROM = ("base", "input", "policy-init", "policy", "model", "source", ADAPTED)

WHAT = {
    "sft": "A language model, fine-tuned on prompts and completions (supervised fine-tuning).",
    "distill": "A language model, distilled from a teacher's distribution over every token of its answers.",
    "reward": "A reward model: a classifier with one output that scores an answer, trained on pairs of answers.",
    "reward probe": "A reward model: a linear head, fitted to pairs of answers, on an unchanged language model.",
    "rlhf": "A language model, trained by reinforcement learning from a reward, held near an anchor by a KL penalty.",
    "convert": "A model, imported as plain safetensors.",
    "export": "A model, written again for other programs: in another dtype or other files, or with its adapter merged.",
    "pick": "A language model, chosen from a post-training run's front of reward over KL.",
    "merge extract-lora": "A LoRA adapter: the difference between a model and its base, as factors of low rank.",
    "merge replace-tokenizer": "A model with another tokenizer; the rows of its tokens come from the old ones.",
    "tiny": "A small model for trying out post-training, pre-trained from scratch.",
}
TAGS = {
    **{"sft": ("sft",), "distill": ("distillation",), "rlhf": ("rlhf",)},
    **{"reward": ("reward-model",), "reward probe": ("reward-model",), "pick": ("warp",), "merge warp": ("warp",)},
}
TREE_LINES = 60
# Commands that write a model again: what it is, is what the model before them was.
CARRIERS = ("export", "doctor --fix", "convert")
GEMMA = "gemma"  # the licence
# Google's models under it, by how their names begin; Gemma 4 has another one.
GEMMAS = tuple(f"google/gemma-{name}" for name in ("2", "7b", "1.1", "3"))
TRAINED = ("sft", "distill", "reward", "reward probe", "rlhf")


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A model that an output was made from, as far as it was found.

    role      in the command that read it: model, policy, base, input, reward, ...
    hub       `owner/name@revision` of a model in the hub's cache
    command   that made it; "" if unknown
    metadata  front matter of the model's card
    """

    role: str
    name: str
    digest: str = ""
    hub: str = ""
    command: str = ""
    metadata: JsonMapping = field(default_factory=dict)
    parents: tuple[Ancestor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Account:
    """The entries of a command that merges for the manifest and the card, in place of those of the merge.

    sections  of the card: (title, Markdown), instead of the table of the summary
    pictures  files that are copied next to the card and shown in it
    files     further files that are copied into the output
    """

    command: str
    config: JsonMapping
    data: Sequence[DataRecord] = ()
    summary: JsonMapping = field(default_factory=dict)
    sections: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Path, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that a card is made from.

    manifest  of the output: command, config, data, seed, versions, summary
    config    its config.json; of an adapter adapter_config.json
    chat      whether its tokenizer has a chat template; None without a tokenizer
    recipe    of a merge: its merge.yaml
    """

    name: str
    manifest: JsonMapping
    config: JsonMapping
    chat: bool | None
    parents: tuple[Ancestor, ...] = ()
    sections: tuple[tuple[str, str], ...] = ()
    pictures: tuple[str, ...] = ()
    recipe: JsonMapping = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command that made the model."""
        return str(self.manifest.get("command", ""))

    @property
    def is_reward(self) -> bool:
        """Whether it is a reward model."""
        names = self.config.get("architectures")
        if self.is_adapter:
            return self.config.get("task_type") == "SEQ_CLS"
        return isinstance(names, list) and any("SequenceClassification" in str(name) for name in names)

    @property
    def is_quantised(self) -> bool:
        """Whether its weights are quantised."""
        return bool(self.config.get("quantization_config"))

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter."""
        return "peft_type" in self.config

    @property
    def sources(self) -> tuple[Ancestor, ...]:
        """The parents whose weights are in this model."""
        return tuple(parent for parent in self.parents if parent.role in MADE_FROM)


def model_card(facts: Facts) -> str:
    """Return the text of README.md."""
    import yaml

    front = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True, default_flow_style=False)
    figures = facts.sections or tuple(_figures(facts.manifest.get("summary")))
    pictures = "".join(f"\n\n![The front of reward over KL]({name})" for name in facts.pictures)
    sections = [
        *((title, text + (pictures if number == 0 else "")) for number, (title, text) in enumerate(figures)),
        ("How to load it", _loading(facts)),
        ("Lineage", _lineage(facts)),
        ("How it was made", _making(facts)),
        ("Limits", _limits(facts)),
    ]
    text = f"---\n{front}---\n\n# {escaped(facts.name)}\n\n{_what(facts)}\n"
    return text + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections)


# --- metadata -------------------------------------------------------------------------------------------------------


def metadata(facts: Facts) -> JsonObject:
    """Return the front matter, without unknown entries."""
    of = tuple(parent for parent in facts.parents if parent.role == "base") if facts.is_adapter else facts.sources
    command, sources = _carried(facts)
    bases = list(dict.fromkeys(_base_names(of or facts.sources)))
    merged = ((command.startswith("merge") and not facts.is_adapter) or command == "pick") and len(_plain(sources)) > 1
    tuned = command in TRAINED or len(_plain(sources)) < len(sources)
    relation = "merge" if merged else "finetune" if tuned else None
    relation = "adapter" if facts.is_adapter else "quantized" if facts.is_quantised else relation
    tags = ["gemma2", *(["merge"] if merged else []), *_tags(facts.command)]
    for ancestor in _all(facts.sources):
        tags += _tags(ancestor.command)
    return {
        **({"base_model": bases if len(bases) > 1 else bases[0]} if bases else {}),
        **({"base_model_relation": relation} if relation and bases else {}),
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-classification" if facts.is_reward else "text-generation",
        "tags": list(dict.fromkeys(tags)),
        **_licence(facts.sources),
        **_inherited(facts.sources, ("language",)),
    }


def _carried(facts: Facts) -> tuple[str, tuple[Ancestor, ...]]:
    """The command that made what the model is, and its models: commands that only write a model again do not count."""
    command, sources = facts.command, facts.sources
    while command in CARRIERS and len(own := _plain(sources)) == 1 and own[0].command and not own[0].hub:
        command, sources = own[0].command, _before(own[0])
    return command, sources


def _plain(sources: Sequence[Ancestor]) -> tuple[Ancestor, ...]:
    """The models without those that are below an adapter among them."""
    return tuple(source for source in sources if source.role != ADAPTED)


def _licence(sources: Sequence[Ancestor]) -> JsonObject:
    """The licence of a model: Gemma's if a Gemma is among its ancestors, else the one that all of them state.

    Gemma's terms hold for every model derived from one, whatever else it is made from.
    """
    if any(_is_gemma(ancestor) for ancestor in _all(sources)):
        return {"license": GEMMA}
    return _inherited(sources, ("license", "license_name", "license_link"))


def _is_gemma(ancestor: Ancestor) -> bool:
    """Whether a model is one of Google's Gemma models, or says that Gemma's terms hold for it."""
    return ancestor.metadata.get("license") == GEMMA or ancestor.hub.startswith(GEMMAS)


def _tags(command: str) -> tuple[str, ...]:
    return TAGS.get(command, ())


def _all(ancestors: Sequence[Ancestor], until: Callable[[Ancestor], bool] | None = None) -> Iterator[Ancestor]:
    """These and their ancestors by weights, each once; the ancestors of one that satisfies `until` are left out."""
    waiting, seen = list(ancestors), set()
    while waiting:
        ancestor = waiting.pop(0)
        if (ancestor.name, ancestor.digest) not in seen:
            seen.add((ancestor.name, ancestor.digest))
            yield ancestor
            waiting = ([] if until and until(ancestor) else list(_before(ancestor))) + waiting


def _before(ancestor: Ancestor) -> tuple[Ancestor, ...]:
    return tuple(parent for parent in ancestor.parents if parent.role in MADE_FROM)


def _base_names(sources: Sequence[Ancestor]) -> Iterator[str]:
    """Hub ids of the nearest ancestors that have one. The name of a directory is not one, and would link to nothing."""
    for ancestor in _all(sources, until=lambda found: bool(found.hub)):
        if ancestor.hub:
            yield ancestor.hub.partition("@")[0]


def _inherited(sources: Sequence[Ancestor], keys: tuple[str, ...]) -> JsonObject:
    """Return the metadata of `keys` if all lines of ancestors state the first one, and the same; else nothing."""

    def states(ancestor: Ancestor) -> bool:
        return keys[0] in ancestor.metadata

    stated = [
        {key: ancestor.metadata[key] for key in keys if key in ancestor.metadata} if states(ancestor) else {}
        for ancestor in _all(sources, until=states)
        if states(ancestor) or not _before(ancestor)
    ]
    return stated[0] if stated and all(other == stated[0] for other in stated) else {}


# --- text -----------------------------------------------------------------------------------------------------------


def _what(facts: Facts) -> str:
    command = facts.command
    if command.startswith("merge ") and command not in WHAT:
        inputs = sum(parent.role == "input" for parent in facts.parents)
        based = " and their base" if inputs > 1 else " and its base"
        base = based if any(parent.role == "base" for parent in facts.parents) else ""
        return f"A merge of {inputs} model{'s' if inputs != 1 else ''}{base} by {code(command[6:])}."
    return WHAT.get(command, f"A model that {code(f'gemma2 {command}')} wrote.")


def _figures(summary: object) -> Iterator[tuple[str, str]]:
    """The numbers and texts of a summary as a table; nothing if it has none."""
    if not isinstance(summary, Mapping):
        return
    rows = []
    for key, value in summary.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str) or str(key).endswith("_se"):
            continue
        error = summary.get(f"{key}_se")
        if isinstance(value, str):
            figure = without_paths(value)
        else:
            figure = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        rows.append([str(key).replace("_", " "), figure + (f" ± {error:.2g}" if isinstance(error, float) else "")])
    if rows:
        yield "Figures", table(["figure", "value"], rows)


def _loading(facts: Facts) -> str:
    if facts.is_adapter:
        return _loading_of_adapter(facts)
    kind = "AutoModelForSequenceClassification" if facts.is_reward else "AutoModelForCausalLM"
    # Gemma 2's soft cap exists in eager attention, not in sdpa.
    eager = ', attn_implementation="eager"' if facts.config.get("attn_logit_softcapping") is not None else ""
    lines = [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        'path = "."  # this directory',
        f"model = {kind}.from_pretrained(path{eager})",
    ]
    if facts.chat is None:
        return fenced("\n".join([lines[0].removesuffix(", AutoTokenizer"), *lines[1:]]), "python")
    lines += ["tokenizer = AutoTokenizer.from_pretrained(path)", *_use(facts.is_reward, facts.chat)]
    return fenced("\n".join(lines), "python")


def _loading_of_adapter(facts: Facts) -> str:
    kind = "AutoPeftModelForSequenceClassification" if facts.is_reward else "AutoPeftModelForCausalLM"
    lines = f'from peft import {kind}\n\nmodel = {kind}.from_pretrained(".")  # this directory, which names its base'
    return f"{fenced(lines, 'python')}\n\nAs a plain model: {code('gemma2 merge linear BASE+ADAPTER --out MODEL')}."


def _use(is_reward: bool, chat: bool) -> list[str]:
    user = '{"role": "user", "content": "What is 2 + 3?"}'
    if is_reward:
        answered = [
            f'messages = [{user}, {{"role": "assistant", "content": "5"}}]',
            'text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\\n")',
        ]
        return [
            *(answered if chat else ['text = "What is 2 + 3? 5"']),
            f'inputs = tokenizer(text, add_special_tokens={not chat}, return_tensors="pt")',
            "print(model(**inputs).logits[0, 0].item())",
        ]
    template = "messages, add_generation_prompt=True, return_dict=True, return_tensors"
    asked = [f"messages = [{user}]", f'inputs = tokenizer.apply_chat_template({template}="pt")']
    return [
        *(asked if chat else ['inputs = tokenizer("The answer to 2 + 3 is", return_tensors="pt")']),
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _lineage(facts: Facts) -> str:
    if not facts.parents:
        return "No model is recorded that it was made from."
    rows = [printable(facts.name), *_tree(facts.parents, "", set())]
    if len(rows) > TREE_LINES:
        rows = [*rows[:TREE_LINES], f"... and {len(rows) - TREE_LINES} more lines; follow the parents in gemma2.json"]
    return "Digests are the first digits of BLAKE3 over the weights.\n\n" + fenced("\n".join(rows), "text")


def _tree(ancestors: Sequence[Ancestor], indent: str, shown_before: set[str]) -> Iterator[str]:
    """A line per model, followed by the lines of its parents, which are listed once per model."""
    for number, ancestor in enumerate(ancestors):
        last = number == len(ancestors) - 1
        name = f"{ancestor.role}: {printable(ancestor.hub or ancestor.name)}"
        details = [
            ancestor.digest.rpartition(":")[2][:10],
            ancestor.command and f"gemma2 {printable(ancestor.command)}",
        ]
        again = bool(ancestor.digest) and ancestor.digest in shown_before and bool(ancestor.parents)
        row = "  ".join([name, *filter(None, details), *(["(as above)"] if again else [])])
        yield f"{indent}{'└─ ' if last else '├─ '}{row}"
        shown_before.add(ancestor.digest)
        if not again:
            yield from _tree(ancestor.parents, indent + ("   " if last else "│  "), shown_before)


def _making(facts: Facts) -> str:
    """Command, seed, data and versions as a list; the settings folded."""
    from gemma2.core.yaml_files import to_yaml

    manifest = facts.manifest
    lines = [f"- Command: {code(f'gemma2 {facts.command}')}"]
    if manifest.get("seed") is not None:
        lines.append(f"- Seed: {code(str(manifest['seed']))}")
    data = manifest.get("data")
    for source in data if isinstance(data, list | tuple) else ():
        name, digest = str(source.get("path", "")), str(source.get("digest", "")).rpartition(":")[2][:10]
        lines.append(f"- Data: {code(without_paths(name))}, BLAKE3 {code(digest)}")
    versions = manifest.get("versions")
    if isinstance(versions, Mapping):
        lines.append("- Versions: " + ", ".join(f"{code(f'{name} {value}')}" for name, value in versions.items()))
    settings = {key: shown(value) for key, value in dict(manifest.get("config") or {}).items()}
    folded = f"<details>\n<summary>Settings</summary>\n\n{fenced(to_yaml(settings), 'yaml')}\n\n</details>"
    text = "\n".join(lines) + (f"\n\n{folded}" if settings else "")
    if facts.recipe:
        again = fenced(to_yaml({key: shown(value) for key, value in facts.recipe.items()}), "yaml")
        text += f"\n\n<details>\n<summary>Recipe: gemma2 merge --config merge.yaml</summary>\n\n{again}\n\n</details>"
    return text


def _limits(facts: Facts) -> str:
    lines = []
    if not facts.sections and facts.command not in TRAINED:
        lines.append("- Nothing was measured on this model.")
    lines.append("- No benchmark and no evaluation of safety, bias or facts was run by the command that made it.")
    if facts.command in ("rlhf", "pick"):
        lines.append(
            "- The reward is the score of a reward model or function, which RL learns to please; it is not the truth."
        )
    licence = _licence(facts.sources).get("license")
    if licence is None:
        why = (
            "the cards of the models that it was made from state none, or different ones"
            if facts.sources
            else "none is stated"
        )
        lines.append(f"- Licence: unknown; {why}.")
    else:
        lines.append(f"- Licence: {code(str(licence))}, that of the models that it was made from.")
    return "\n".join(lines)
