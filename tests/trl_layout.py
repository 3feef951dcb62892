"""Batches as TRL's trainers hold them, for comparisons with ours."""

from __future__ import annotations

import torch


def trl_layout(batch):
    """Our right-padded rows as TRL lays them out: prompts padded on the left, completions on the right."""
    rows = []
    for ids, mask in zip(batch["ids"], batch["mask"], strict=True):
        start, end = int(mask.nonzero()[0]), int(mask.nonzero()[-1]) + 1
        rows.append((ids[:start], ids[start:end]))
    left, right = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    pad = torch.nn.functional.pad
    return {
        "prompt_ids": torch.stack([pad(p, (left - len(p), 0)) for p, _ in rows]),
        "prompt_mask": torch.stack([pad(torch.ones_like(p), (left - len(p), 0)) for p, _ in rows]),
        "completion_ids": torch.stack([pad(c, (0, right - len(c))) for _, c in rows]),
        "completion_mask": torch.stack([pad(torch.ones_like(c), (0, right - len(c))) for _, c in rows]),
    }
