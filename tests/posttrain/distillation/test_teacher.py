"""Teachers that cannot be compared with a student are refused, in words that say why."""

import pytest
import torch

from gemma2.core.errors import InputError
from gemma2.posttrain.distillation.teacher import check_head, check_same_tokenizer, common_vocabulary
from gemma2.posttrain.tiny.networks import random_model, tiny_tokenizer


def test_a_teacher_with_other_tokens_or_another_template_is_refused():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    check_same_tokenizer(theirs, ours, "teacher", "student")
    theirs.add_tokens(["zebra"])
    with pytest.raises(InputError, match="'zebra' is 512 in the teacher and missing in the student"):
        check_same_tokenizer(theirs, ours, "teacher", "student")
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("user", "human").replace("'human'", "'user'")
    with pytest.raises(InputError, match="chat templates"):
        check_same_tokenizer(other, ours, "teacher", "student")
    bare = tiny_tokenizer()
    bare.chat_template = None
    check_same_tokenizer(bare, ours, "teacher", "student")


def test_heads_that_lack_a_token_are_refused():
    assert common_vocabulary(512, 512, 512) is None
    assert common_vocabulary(600, 512, 512) == 512
    with pytest.raises(InputError, match="600 and 500 rows for 512 tokens"):
        common_vocabulary(600, 500, 512)


def test_a_head_that_is_more_than_a_product_and_a_cap_is_refused():
    model = random_model()
    check_head(model, "model")
    model.lm_head.bias = torch.nn.Parameter(torch.full((512,), 0.5).index_fill(0, torch.tensor([3]), 5.0))
    with pytest.raises(InputError, match="computes its logits"):
        check_head(model, "model")
