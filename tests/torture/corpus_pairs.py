"""Models that do not fit each other, and malformed adapters."""

from __future__ import annotations

import numpy as np
from corpus import (
    PEFT,
    Case,
    Q,
    both,
    edited,
    header,
    header_text,
    keyed,
    nothing,
    removed,
    swapped,
    tensors,
    text,
)
from corpus_models import CONFIG, EMBED, MERGE, NORM

PAIRS = {
    "other widths": Case(keyed(CONFIG, hidden_size=16), MERGE, ("hidden_size is 16", "rl-2", "[128, 8]")),
    "other architectures": Case(
        keyed(CONFIG, architectures=["LlamaForCausalLM"], model_type="llama"), MERGE, ("rl-1", "rl-2")
    ),
    "a policy and a reward model": Case(nothing, "merge linear rl-1 rm --out out", ("rm", "reward model")),
    "another soft cap": Case(keyed(CONFIG, final_logit_softcapping=1.0), MERGE, ("final_logit_softcapping",)),
    "another scale of attention": Case(keyed(CONFIG, query_pre_attn_scalar=9), MERGE, ("query_pre_attn_scalar", "9")),
    "a tensor more": Case(tensors("rl-2", lambda a: a.update(x=np.ones(2))), MERGE, ("rl-2", "x")),
    "a tensor less": Case(tensors("rl-2", lambda a: a.pop(NORM)), MERGE, ("rl-1", NORM)),
    "another shape": Case(
        tensors("rl-2", lambda a: a.__setitem__(NORM, np.ones(9))), MERGE, (NORM, "[8]", "[9]", "rl-2")
    ),
    "another tokenizer": Case(
        swapped("rl-2/tokenizer.json", '"~"', '"\\u00e9"'), MERGE, ("rl-1", "rl-2", "tokenizers")
    ),
    "an own head": Case(
        both(
            tensors("rl-2", lambda a: a.update({"lm_head.weight": a[EMBED] * 2})),
            keyed(CONFIG, tie_word_embeddings=False),
        ),
        MERGE,
        ("rl-2", "tie_word_embeddings"),
    ),
    "a base of another width": Case(
        keyed("base/config.json", hidden_size=16),
        "merge slerp rl-1 rl-2 --base base --out out",
        ("hidden_size", "base"),
    ),
    "one model for slerp": Case(nothing, "merge slerp rl-1 --base base --out out", ("slerp",)),
    "more weights than models": Case(nothing, f"{MERGE} --weights 1,2,3", ("weights", "3"), 2),
    "a weight that is no number": Case(nothing, f"{MERGE} --weights 1,x", ("weights",), 2),
    "a density above 1": Case(nothing, "merge ties rl-1 rl-2 --base base --density 2 --out out", ("density",), 2),
    "NaN for eta": Case(nothing, "merge liti rl-1 --base base --eta nan --out out", ("eta",), 2),
    "a missing base": Case(nothing, "merge liti rl-1 --eta 0.5 --out out", ("base",)),
    "diff of other shapes": Case(
        tensors("rl-2", lambda a: a.__setitem__(NORM, np.ones(9))), "diff rl-1 rl-2", (NORM, "[9]")
    ),
    "diff with NaN": Case(tensors("rl-2", lambda a: a[NORM].__setitem__(3, np.nan)), "diff rl-1 rl-2", ("rl-2", NORM)),
    "a merge of the base alone with itself as a base that is missing": Case(
        nothing, "merge task-arithmetic rl-1 rl-2 --base gone --out out", ("gone",)
    ),
}

LORA, FACTORS, LORA_MERGE = "lora/adapter_config.json", "lora/adapter_model.safetensors", "merge linear lora --out out"
A = f"{PEFT}{Q}.lora_A.weight"
ADAPTERS = {
    "without its model": Case(
        both(keyed(LORA, base_model_name_or_path="gone/model-x"), removed("rl-2")),
        LORA_MERGE,
        ("adapter", "gone/model-x"),
    ),
    "without a recorded model": Case(
        keyed(LORA, base_model_name_or_path=None), LORA_MERGE, ("adapter", "not recorded")
    ),
    "without a configuration": Case(removed(LORA), LORA_MERGE, ("lora", "adapter")),
    "without a configuration, shown": Case(removed(LORA), "inspect lora", ("lora", "adapter")),
    "without a configuration, trained": Case(
        removed(LORA), "sft --model lora --data chats.jsonl --out out", ("lora", "adapter")
    ),
    "as a policy": Case(nothing, "sft --model lora --data chats.jsonl --out out", ("lora", "adapter")),
    "as an init": Case(
        nothing, "rlhf --policy lora --reward rm --prompts prompts.jsonl --out out", ("--policy lora", "adapter")
    ),
    "as a reward model": Case(
        nothing, "rlhf --policy base --reward lora --prompts prompts.jsonl --out out", ("--reward lora", "adapter")
    ),
    "weights missing": Case(removed(FACTORS), LORA_MERGE, ("lora", "adapter_model.safetensors")),
    "pickled": Case(both(removed(FACTORS), text("lora/adapter_model.bin", b"x")), LORA_MERGE, ("lora", "pickled")),
    "truncated": Case(edited(FACTORS, lambda data: data[:-1]), LORA_MERGE, (FACTORS, "is truncated")),
    "no JSON": Case(text(LORA, "{"), LORA_MERGE, (LORA, "not readable JSON")),
    "a key twice": Case(swapped(LORA, '"r"', '"r": 4, "r"'), LORA_MERGE, (LORA, "'r'", "twice")),
    "another kind": Case(keyed(LORA, peft_type="IA3"), LORA_MERGE, (LORA, "IA3")),
    "DoRA": Case(keyed(LORA, use_dora=True), LORA_MERGE, (LORA, "use_dora")),
    "a rank of zero": Case(keyed(LORA, r=0), LORA_MERGE, (LORA, "r is 0")),
    "another rank": Case(keyed(LORA, r=4), LORA_MERGE, ("lora", "rank 4", "adapter_config.json")),
    "a rank that is a text": Case(keyed(LORA, r="2"), LORA_MERGE, (LORA, "not a positive number")),
    "a pattern that is no expression": Case(keyed(LORA, rank_pattern={"(": 2}), LORA_MERGE, (LORA, "rank_pattern")),
    "half of a pair": Case(header(FACTORS, lambda h: h | {"x": h.pop(A)}), LORA_MERGE, (FACTORS, "x")),
    "of a module that the model lacks": Case(
        header_text(FACTORS, lambda data: data.replace(b"layers.0", b"layers.7")),
        LORA_MERGE,
        ("lora", "layers.7", "rl-2"),
    ),
    "a reward model in its place": Case(nothing, "merge linear base+rm --out out", ("rm", "adapter")),
    "a model and a file": Case(nothing, "merge linear base+recipe.yaml --out out", ("recipe.yaml",)),
}
