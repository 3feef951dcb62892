"""The chat template of an output: the one that most inputs have, one by name, or Jinja text.

The texts by name write the public formats that they are called after, without tools or default system messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2.core.errors import UsageError
from gemma2.core.json_files import read_json, write_json
from gemma2.core.outputs.safetensors_header import printable
from gemma2.merging.inputs.checkpoint import Checkpoint
from gemma2.merging.methods.request import file_named, is_input

from .input_choice import of_input
from .token_ids import TOKENIZER

__all__ = ["ChatTemplate", "choose_template", "template_of", "write_template"]

SETTINGS, TEXT, OLD = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"

# Name -> markers that should be tokens, and the template.
NAMED = {
    "chatml": (
        ("<|im_start|>", "<|im_end|>"),
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama3": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "mistral": (
        ("[INST]", "[/INST]"),
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}"
        "{{ eos_token }}{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}",
    ),
    "alpaca": (
        (),
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
    ),
}


@dataclass(frozen=True)
class ChatTemplate:
    """The text of the output's template (None: nothing is written), and notes about the choice."""

    text: str | None
    notes: tuple[str, ...] = ()


def template_of(model: Checkpoint) -> str | None:
    """Return the chat template of a model; of several named ones the default."""
    found: object = None
    if (model.origin / TEXT).is_file():
        return (model.origin / TEXT).read_text(encoding="utf-8")
    for name in (OLD, SETTINGS):
        if found is None and (model.origin / name).is_file():
            found = read_json(model.origin / name).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def choose_template(choice: str | None, inputs: Sequence[Checkpoint], owner: Checkpoint) -> ChatTemplate | None:
    """Return the chosen template; None leaves that of the tokenizer. Raises UsageError.

    owner  of the output's tokenizer
    """
    if choice is None:
        return None
    if choice == "auto":
        return _most_common(inputs)
    if is_input(choice):
        model, text = of_input("--chat-template", choice, inputs, template_of)
        return ChatTemplate(text, (f"chat template: that of {model.role}",))
    if file := file_named(choice):
        return ChatTemplate(file.read_text(encoding="utf-8"), (f"chat template: {printable(file.name)}",))
    if choice in NAMED:
        markers, text = NAMED[choice]
        file = owner.origin / TOKENIZER
        known = file.read_text(encoding="utf-8") if file.is_file() else ""
        absent = [marker for marker in markers if f'"{marker}"' not in known]
        note = f"chat template {choice}: {', '.join(absent)} not in the tokenizer, read as plain text" if absent else ""
        return ChatTemplate(text, (f"chat template: {choice}", *([note] if note else [])))
    if "{{" not in choice and "{%" not in choice:
        raise UsageError(
            f"chat_template {printable(choice)!r} is neither a name nor a template",
            f"choose the number of a model, base, a file, auto, {', '.join(NAMED)}, or write Jinja text",
        )
    return ChatTemplate(choice, ("chat template: the text of the request",))


def _most_common(inputs: Sequence[Checkpoint]) -> ChatTemplate:
    having = [(model, text) for model in inputs if (text := template_of(model)) is not None]
    if not having:
        return ChatTemplate(None, ("chat template auto: no input has one, and the output has none",))
    ((text, count),) = Counter(text for _, text in having).most_common(1)  # of equal counts the first
    first = next(model.role for model, own in having if own == text)
    return ChatTemplate(text, (f"chat template: that of {first}, which {count} of {len(inputs)} inputs have",))


def write_template(template: ChatTemplate, directory: Path) -> None:
    """Write the template as chat_template.jinja, and remove others."""
    if template.text is None:
        return
    (directory / TEXT).write_text(template.text, encoding="utf-8")
    (directory / OLD).unlink(missing_ok=True)
    settings = directory / SETTINGS
    if settings.is_file():
        known = dict(read_json(settings))
        if known.pop("chat_template", None) is not None:
            write_json(settings, known)
