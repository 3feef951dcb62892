"""A reward model on a Hugging Face Inference Endpoint: `gemma2 export --endpoint` copies this file next to the model.

The endpoint's toolkit imports it and calls `EndpointHandler(path)` once, and the object for every request:

    {"inputs": X}  ->  [{"score": 1.25}, ...]      one for each conversation

X is a conversation, or a list of them. A conversation is a list of messages ({"role": "user" or "assistant",
"content": text}) that ends with the answer to be scored. It becomes tokens as in training: by the chat template, up to
the end of the last turn; a control token in the text of a message is text; a system text begins the first message.
"""

from __future__ import annotations

import re

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 8  # conversations at once
EAGER = "eager"  # Gemma 2's soft cap exists in eager attention, not in sdpa


class EndpointHandler:
    """Scores conversations with the reward model in a directory."""

    def __init__(self, path: str = "") -> None:
        accelerated = torch.accelerator.is_available()
        self.device = torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # Without an accelerator in fp32: bf16 is slow and less exact there.
        self.model = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype="auto" if accelerated else torch.float32,
            attn_implementation=EAGER,
            trust_remote_code=False,
        )
        self.model.to(self.device).eval()
        controls = sorted(
            (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special), key=len
        )
        self.controls = re.compile("(" + "|".join(re.escape(token) for token in reversed(controls)) + ")")

    def __call__(self, data: dict[str, object]) -> list[dict[str, float]]:
        """Return the score of each conversation in `data["inputs"]`. Raises ValueError for what is not one."""
        rows = [self._ids(one) for one in conversations(data.get("inputs"))]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # rows of similar length together
        scores: dict[int, float] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            for number, score in zip(batch, self._scored([rows[number] for number in batch]), strict=True):
                scores[number] = score
        return [{"score": scores[number]} for number in range(len(rows))]

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation. Answers are encoded by themselves, as they are when a policy writes them."""
        turns = folded([{**one, "content": one["content"].strip()} for one in messages])
        words = [f"Qzx{'x' * number}xzQ" for number in range(len(turns))]
        stand_ins = [{**turn, "content": word} for turn, word in zip(turns, words, strict=True)]
        text = self.tokenizer.apply_chat_template(stand_ins, tokenize=False).rstrip("\n")
        runs = [""]  # text, or one control token, in turn
        for part in re.split("(Qzxx*xzQ)", text):
            if part in words:
                turn = turns[words.index(part)]
                if turn["role"] == "user":
                    runs[-1] += turn["content"]
                else:
                    runs += ["", turn["content"]]
            else:
                first, *rest = self.controls.split(part)
                runs[-1] += first
                runs += rest
        ids: list[int] = []
        for number, run in enumerate(runs):
            if number % 2:
                ids += [self.tokenizer.convert_tokens_to_ids(run)] if run else []
            elif run:
                ids += self.tokenizer(run, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    @torch.no_grad()
    def _scored(self, rows: list[list[int]]) -> list[float]:
        """Scores of one batch, padded on the right: the model reads each row at its last token."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        scores = self.model.score(hidden[torch.arange(len(rows), device=self.device), last])  # (B, 1)
        return [float(score) for score in scores.squeeze(-1)]


def conversations(inputs: object) -> list[list[dict[str, str]]]:
    """Return the conversations of a request. Raises ValueError."""
    found: list[list[dict[str, str]]] = []
    many: list[object] = inputs if isinstance(inputs, list) and inputs and isinstance(inputs[0], list) else [inputs]
    for one in many:
        if not isinstance(one, list) or not one or not all(map(_is_message, one)):
            raise ValueError('"inputs" must be a list of messages with role and content, or a list of such lists')
        if one[-1]["role"] not in ("assistant", "model"):
            raise ValueError("a conversation must end with the answer to be scored, a message of the assistant")
        found.append(one)
    return found


def folded(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the turns with a system text at the beginning of the first one: Gemma 2 has no role for it."""
    if messages[0]["role"] != "system" or len(messages) == 1:
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
