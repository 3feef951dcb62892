"""Unsafe answers, found by a model from a local directory.

A sequence classifier reads a model turn and gives the probability of its unsafe labels: softmax, or sigmoid if its
configuration says multi-label. A causal model is prompted like ShieldGemma (Zeng et al. 2024, 2407.21772, section 4 and
its model card): P(Yes) / (P(Yes) + P(No)) for the next token after a policy, with the user turn before the answer; the
largest of four policies counts. Long turns are read in windows and the worst window counts: nothing is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from gemma2.core.errors import InputError, UsageError
from gemma2.core.foreign.code_keys import refuse_code
from gemma2.merging.inputs.architecture import classifies
from gemma2.posttrain.data.sources import Row
from gemma2.posttrain.data.tokenizer import Tokenizer
from gemma2.posttrain.models.loading import default_device, load_policy, load_tokenizer, read_config
from gemma2.posttrain.schemas import FilterConfig

from .criteria.sample import Sample, sample_of
from .scan import STAYS, Findings

__all__ = ["SafetyModel", "unsafe_labels"]

Exchange = tuple[str, str]  # text of the user, answer of the model
Verdict = tuple[float, str]  # probability of an unsafe answer, and its kind

# Labels of widespread classifiers that mean safe.
SAFE_LABEL = re.compile(
    r"safe|neutral|normal|clean|none|ok|sfw|label_0|benign|acceptable|harmless"
    r"|(?:non|not)[-_ ]?(?:toxic|hate|offensive)",
    re.IGNORECASE,
)
# The policies on which ShieldGemma was trained, from its model card.
POLICIES = {
    "dangerous content": "The chatbot shall not generate content that harms oneself and/or others (e.g., accessing or"
    " building firearms and explosive devices, promotion of terrorism, instructions for suicide).",
    "harassment": "The chatbot shall not generate content that is malicious, intimidating, bullying, or abusive content"
    " targeting another individual (e.g., physical threats, denial of tragic events, disparaging victims of violence).",
    "hate speech": "The chatbot shall not generate content targeting identity and/or protected attributes (e.g., racial"
    " slurs, promotion of discrimination, calls to violence against protected groups).",
    "sexually explicit": "The chatbot shall not generate content that contains references to sexual acts or other lewd"
    " content (e.g., sexually graphic descriptions, content aimed at causing arousal).",
}
ASKED = (
    "You are a policy expert trying to help determine whether an AI assistant's response to prompts is in violation of"
    " the defined safety policies.\n\n<start_of_turn>\nHuman Question: "
)
YES_NO = ("Yes", "No")
ANSWERED = "\n\nChatbot Response: "
POLICY = (
    "\n<end_of_turn>\n\nOur safety principle is defined in the below:\n\n* {policy}\n\n===\nDoes the chatbot response"
    " violate the above principle? Your answer must start with 'Yes' or 'No'. And then walk through step by step to be"
    " sure we answer correctly.\n\n"
)


class _Judge(Protocol):
    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


class SafetyModel:
    """Drops the rows in which a safety model finds an unsafe answer."""

    def __init__(self, judge: _Judge, threshold: float) -> None:
        self._judge = judge
        self.threshold = threshold

    @classmethod
    def load(cls, config: FilterConfig) -> SafetyModel:
        """Load `config.safety_model`, a classifier or a causal LM according to its config.json."""
        assert config.safety_model is not None
        is_classifier = classifies(read_config(config.safety_model))
        return cls(_Classifier(config) if is_classifier else _PolicyJudge(config), config.safety_threshold)

    def drop_unsafe(self, chunk: Sequence[Row], findings: Findings) -> None:
        """Drop rows that passed the other filters but have an unsafe answer."""
        exchanges: list[Exchange] = []
        rows: list[int] = []
        for index in (findings.codes == STAYS).nonzero()[0].tolist():
            for exchange in _exchanges(sample_of(chunk[index])):
                exchanges.append(exchange)
                rows.append(index)
        worst: dict[int, Verdict] = {}
        for index, verdict in zip(rows, self._judge.judge(exchanges), strict=True):
            worst[index] = max(worst.get(index, verdict), verdict)
        for index, (probability, kind) in worst.items():
            if probability >= self.threshold:
                findings.drop(index, [("unsafe", f"{kind} with probability {probability:.2f}")])


def unsafe_labels(labels: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return indices of the labels that mean unsafe: `wanted`, by default all whose names do not mean safe.

    Raises UsageError for an unknown label, and if no name of several means safe.
    """
    listed = ", ".join(labels)
    if unknown := sorted(set(wanted) - set(labels)):
        raise UsageError(f"--safety-labels {unknown[0]} is not a label of the model", f"its labels are {listed}")
    chosen = [i for i, name in enumerate(labels) if name in wanted or (not wanted and not SAFE_LABEL.fullmatch(name))]
    if not wanted and len(labels) > 1 and len(chosen) == len(labels):
        raise UsageError(
            f"the labels of the safety model do not show which mean unsafe: {listed}", "name them with --safety-labels"
        )
    return chosen


class _Classifier:
    def __init__(self, config: FilterConfig) -> None:
        path = config.safety_model
        assert path is not None
        self.tokenizer = load_tokenizer(path)
        refuse_code(path)
        self.model, report = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        if report["missing_keys"]:
            raise InputError(f"{path} lacks tensor {sorted(report['missing_keys'])[0]}", "give a trained classifier")
        self.model.to(default_device()).eval()
        self.labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.several = self.model.config.problem_type == "multi_label_classification" or len(self.labels) == 1
        self.unsafe = unsafe_labels(self.labels, config.safety_labels)
        positions = getattr(self.model.config, "max_position_embeddings", None) or config.safety_max_length
        self.length = min(config.safety_max_length, positions, self.tokenizer.model_max_length)
        self.batch_size = config.batch_size

    @torch.no_grad()
    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        if not exchanges:
            return []
        answers = [answer for _, answer in exchanges]
        windows = self.tokenizer(
            answers,
            truncation=True,
            max_length=self.length,
            return_overflowing_tokens=True,
            split_special_tokens=True,
        )
        pieces = list(zip(windows["overflow_to_sample_mapping"], windows["input_ids"], strict=True))
        verdicts: list[Verdict] = [(0.0, self.labels[self.unsafe[0]])] * len(exchanges)
        for begin in range(0, len(pieces), self.batch_size):
            batch = pieces[begin : begin + self.batch_size]
            rows = [{"input_ids": ids} for _, ids in batch]
            inputs = self.tokenizer.pad(rows, return_tensors="pt", padding_side="right").to(self.model.device)
            logits = self.model(**inputs).logits.float()
            probabilities = logits.sigmoid() if self.several else logits.softmax(-1)
            for (i, _), row in zip(batch, probabilities.cpu()[:, self.unsafe], strict=True):
                verdicts[i] = max(verdicts[i], self._verdict(row))
        return verdicts

    def _verdict(self, row: Tensor) -> Verdict:
        """Return the verdict of row: (unsafe labels,) probabilities. Mutually exclusive labels add up."""
        kind = self.labels[self.unsafe[int(row.argmax())]]
        return float(row.max() if self.several else row.sum()), kind


class _PolicyJudge:
    def __init__(self, config: FilterConfig) -> None:
        path = config.safety_model
        assert path is not None
        device = default_device()
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model, self.tokenizer = load_policy(path, dtype)
        answers = [self.tokenizer.encode(word, add_special_tokens=False) for word in YES_NO]
        if any(len(ids) != 1 for ids in answers) or answers[0] == answers[1]:
            what = f"the tokenizer of {path} has no single token for {' and '.join(YES_NO)}"
            raise InputError(what, "give a ShieldGemma-style model")
        self.yes_no = [ids[0] for ids in answers]
        self.length, self.batch_size = config.safety_max_length, config.batch_size

    @torch.no_grad()
    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        pieces = [
            (i, kind, ids)
            for i, exchange in enumerate(exchanges)
            for kind, policy in POLICIES.items()
            for ids in self._prompts(exchange, policy)
        ]
        verdicts: list[Verdict] = [(0.0, "")] * len(exchanges)
        for begin in range(0, len(pieces), self.batch_size):
            batch = pieces[begin : begin + self.batch_size]
            rows = [{"input_ids": ids} for _, _, ids in batch]
            inputs = self.tokenizer.pad(rows, return_tensors="pt", padding_side="left").to(self.model.device)
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits = self.model(**inputs, position_ids=positions, logits_to_keep=1, use_cache=False).logits[:, -1]
            yes = logits[:, self.yes_no].float().softmax(-1)[:, 0].cpu()
            for (i, kind, _), probability in zip(batch, yes.tolist(), strict=True):
                verdicts[i] = max(verdicts[i], (probability, kind))
        return verdicts

    def _prompts(self, exchange: Exchange, policy: str) -> Iterator[list[int]]:
        """Yield token ids, one list per window of the answer. Text of rows is never read as control tokens."""
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        head, middle, tail = (
            self.tokenizer.encode(text, add_special_tokens=False)
            for text in (ASKED, ANSWERED, POLICY.format(policy=policy))
        )
        asked = _encode(self.tokenizer, exchange[0])[: self.length // 2]
        room = max(self.length - len(asked), 1)
        for window in _windows(_encode(self.tokenizer, exchange[1]), room):
            yield [*bos, *head, *asked, *middle, *window, *tail]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _windows(ids: list[int], size: int) -> list[list[int]]:
    return [ids[begin : begin + size] for begin in range(0, max(len(ids), 1), size)]


def _exchanges(sample: Sample) -> Iterator[Exchange]:
    asked = ""
    for ours, text in sample.turns:
        if ours:
            yield asked, text
        else:
            asked = text
