"""flex_attention on a CPU: torch's uncompiled form, which has the backward pass that its compiled CPU kernel lacks."""

from functools import partial

import pytest
import torch.nn.attention.flex_attention as flex
import transformers.integrations.flex_attention as integration
import transformers.masking_utils as masking


@pytest.fixture
def uncompiled_flex(monkeypatch):
    def plain(query, key, value, training=False, **options):
        return flex.flex_attention(query, key, value, **options)

    make = partial(masking.create_block_mask)

    def uncompiled_mask(*arguments, **options):
        return make(*arguments, **options | {"_compile": False})

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plain)
    monkeypatch.setattr(masking, "create_block_mask", uncompiled_mask)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)  # it refuses gradients on a CPU
