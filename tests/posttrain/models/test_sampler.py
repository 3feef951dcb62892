"""The sampler draws exactly from the policy, and greedily it is `generate`, token for token."""

import math

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma2.core.errors import InputError
from gemma2.posttrain.models import sampler
from gemma2.posttrain.models.decoder import StepDecoder
from gemma2.posttrain.models.sampler import SamplingParams, decode, draw, sample, truncated_mass

WINDOW = 8
VOCAB = 61
STOP, PAD = 1, 0


def gemma(vocab=VOCAB, scale=0.5, **options):
    """A Gemma 2 with every feature on, and logits wide enough that both soft caps bite."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        max_position_embeddings=128,
        initializer_range=scale,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
        **options,
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return gemma()


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def generate(model, prompts, limit):
    """Greedy reference: transformers' own generate on a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=STOP, pad_token_id=PAD
    )
    rows = [row[width:].tolist() for row in out]
    return [row[: row.index(STOP) + 1] if STOP in row else row for row in rows]


@pytest.mark.parametrize("lengths", [[5, 3, 4], [20, 2, 11, 7], [WINDOW, WINDOW - 1, 1]])
def test_greedy_equals_generate_with_padding_sliding_window_and_soft_caps(model, lengths):
    prompts = prompts_of(lengths)
    ours = sample(model, prompts, SamplingParams(24, temperature=0.0), [STOP], PAD)
    assert ours.ids == generate(model, prompts, 24)
    assert max(map(len, ours.ids)) + max(lengths) > 2 * WINDOW


@pytest.mark.parametrize("feature", ["window", "attention cap"])
def test_the_greedy_comparison_would_notice_a_missing_feature(model, feature):
    prompts = prompts_of([20, 12, 9, 16])
    other = gemma()
    if feature == "window":
        other.config.layer_types = ["full_attention"] * 4
    else:
        for layer in other.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    params = SamplingParams(24, temperature=0.0)
    assert sample(other, prompts, params, [STOP], PAD).ids != sample(model, prompts, params, [STOP], PAD).ids


def chi_square(counts, probs):
    """Pearson's statistic over cells with an expectation of at least 5, and its degrees of freedom."""
    expected = probs * counts.sum()
    cells = expected >= 5
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    return float(statistic), int(cells.sum()) - 1


def truncated(logits, top_p, top_k, min_p=0.0):
    """What transformers' own filters leave of a distribution, renormalised."""
    filters = [TopKLogitsWarper(top_k)] if top_k else []
    filters += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    filters += [MinPLogitsWarper(min_p)] if min_p else []
    for each in filters:
        logits = each(None, logits)
    return torch.softmax(logits, -1)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (0.7, 1.0, 0, 0.0),
        (1.0, 1.0, 0, 0.0),
        (1.3, 0.8, 0, 0.0),
        (1.0, 1.0, 3, 0.0),
        (0.9, 0.85, 5, 0.0),
        (1.2, 1.0, 0, 0.15),
    ],
)
def test_two_token_completions_follow_the_distribution(temperature, top_p, top_k, min_p):
    vocab, n = 7, 20000
    model = gemma(vocab=vocab)
    prompt = [2, 4, 3]
    params = SamplingParams(2, temperature, n, top_p, top_k, min_p)
    out = sample(model, [prompt], params, [], PAD, torch.Generator().manual_seed(5), n)
    pairs = torch.tensor(out.ids)
    counts = torch.bincount(pairs[:, 0] * vocab + pairs[:, 1], minlength=vocab**2).double()
    with torch.no_grad():
        context = torch.tensor([[*prompt, a] for a in range(vocab)])
        logits = model(context).logits.double() / temperature
    first = truncated(logits[:1, 2], top_p, top_k, min_p)[0]
    second = truncated(logits[:, 3], top_p, top_k, min_p)
    expected = (first[:, None] * second).flatten()
    assert not counts[expected == 0].any()
    statistic, freedom = chi_square(counts, expected)
    assert freedom > (20 if top_p == 1 and not top_k and not min_p else 5)
    # Wilson-Hilferty: the 0.9999 quantile of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_a_draw_inverts_the_distribution_function():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    params = SamplingParams(1)
    for u, token in [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (1 - 1e-16, 2)]:
        drawn, logp = draw(logits, torch.tensor([u], dtype=torch.float64), params)
        assert drawn.item() == token
        assert logp.item() == pytest.approx(math.log([0.2, 0.5, 0.3][token]), abs=1e-6)


@pytest.mark.parametrize("vocabulary", [4096, 5000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_wide_vocabulary_is_searched_in_blocks_for_the_same_tokens(vocabulary, temperature):
    """Against the distribution function in float64, also where u is at either end and a block has hardly any mass."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, vocabulary, generator=generator) * 3
    logits[:20, 1024:2048] = -60.0
    uniforms = torch.rand(40, dtype=torch.float64, generator=generator)
    uniforms[:4] = torch.tensor([0.0, 1 - 2**-53, 0.5, 1e-300])
    tokens, logps = draw(logits, uniforms, SamplingParams(1, temperature))
    exact = torch.log_softmax(logits.double() / temperature, -1)
    cumulative = exact.exp().cumsum(-1)
    before = cumulative.gather(1, tokens[:, None]).squeeze(1)
    width = exact.gather(1, tokens[:, None]).squeeze(1)
    assert (uniforms < before + 1e-6).all()
    assert (uniforms > before - width.exp() - 1e-6).all()
    torch.testing.assert_close(logps, width.float(), atol=2e-6, rtol=0)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()


def test_draws_from_a_wide_vocabulary_follow_the_distribution():
    """Chi-square over 16 tokens in several blocks; all other tokens have probability 0."""
    places = torch.arange(16) * 300 + 7
    logits = torch.full((1, 5000), -200.0)
    logits[0, places] = torch.linspace(-2, 2, 16)
    count = 4000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, _ = draw(logits.expand(count, -1), uniforms, SamplingParams(1))
    expected = torch.softmax(logits[0, places].double(), -1) * count
    seen = (tokens[:, None] == places).sum(0).double()
    assert seen.sum() == count
    assert ((seen - expected) ** 2 / expected).sum() < 37.7  # the 99.9 % point of 15 degrees of freedom


def test_a_row_draws_the_same_from_a_wide_vocabulary_whatever_the_other_rows(monkeypatch):
    logits = torch.randn(7, 5000, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = draw(logits, uniforms, SamplingParams(1))
    monkeypatch.setattr(sampler, "TILE", 5000 * 2)
    in_tiles = draw(logits, uniforms, SamplingParams(1))
    alone = [draw(logits[i : i + 1], uniforms[i : i + 1], SamplingParams(1)) for i in range(7)]
    for found in (in_tiles, tuple(torch.cat(column) for column in zip(*alone, strict=True))):
        assert torch.equal(found[0], together[0]) and torch.equal(found[1], together[1])


def test_top_k_and_top_p_exclude_tokens_but_not_from_the_log_probs():
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    u = torch.tensor([0.0], dtype=torch.float64)
    assert draw(logits, u, SamplingParams(1, top_k=2))[0].item() == 1
    assert draw(logits, u, SamplingParams(1, top_p=0.85))[0].item() == 1
    high = torch.tensor([0.999], dtype=torch.float64)
    token, logp = draw(logits, high, SamplingParams(1, top_p=0.3))
    assert token.item() == 1
    assert logp.item() == pytest.approx(math.log(0.5), abs=1e-6)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.3, 0), (0.9, 0), (0.999, 0), (1.0, 7), (0.5, 12)])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_top_k_top_p_and_min_p_keep_the_tokens_of_transformers_also_beyond_the_first_ranks(
    top_p, top_k, min_p, sharpness, monkeypatch
):
    monkeypatch.setattr(sampler, "RANKED", 8)
    logits = sharpness * torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kept = truncated_mass(torch.softmax(logits, -1), SamplingParams(1, top_p=top_p, top_k=top_k, min_p=min_p))
    assert torch.allclose(kept / kept.sum(-1, keepdim=True), truncated(logits, top_p, top_k, min_p), atol=1e-12)


def test_each_row_of_a_batch_of_very_different_lengths_gets_the_same_tokens_as_alone(model):
    prompts = prompts_of([60, 1, 33, 2, 1, 59])
    prompts[4] = prompts[1]  # the same prompt twice shares a prefill
    params = SamplingParams(20)
    uniforms = torch.rand(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    together = decode(model, prompts, params, [STOP], PAD, uniforms)
    for i, (ids, logps, truncated) in enumerate(together):
        ((alone, alone_logps, cut),) = decode(model, [prompts[i]], params, [STOP], PAD, uniforms[i : i + 1])
        assert (
            ids == alone
            and truncated == cut
            and torch.allclose(torch.tensor(logps), torch.tensor(alone_logps), atol=1e-5)
        )
    assert together[1] != together[4]


def test_log_probs_are_those_of_an_independent_forward(model):
    prompts = prompts_of([6, 14])
    params = SamplingParams(18, temperature=0.8, n=3)
    out = sample(model, prompts, params, [STOP], PAD, torch.Generator().manual_seed(0))
    for ids, logps, index in zip(out.ids, out.logps, out.prompt_index, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompts[index] + ids])).logits[0].double() / 0.8
        start = len(prompts[index]) - 1
        expected = torch.log_softmax(logits[start:-1], -1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(logps).double(), expected, atol=2e-5)


def test_samples_do_not_depend_on_the_batch_size(model):
    prompts = prompts_of([6, 14, 3, 9, 9])
    params = SamplingParams(16, n=2)
    whole, single = (
        sample(model, prompts, params, [STOP], PAD, torch.Generator().manual_seed(1), batch_size=size)
        for size in (64, 1)
    )
    assert whole.ids == single.ids
    assert whole.prompt_index == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_the_generator_state_decides_the_samples(model):
    prompts = prompts_of([6, 14])
    params = SamplingParams(16, n=2)
    generator = torch.Generator().manual_seed(1)
    sample(model, prompts, params, [STOP], PAD, generator)
    state = generator.get_state()
    second = sample(model, prompts, params, [STOP], PAD, generator)
    other = torch.Generator()
    other.set_state(state)
    assert sample(model, prompts, params, [STOP], PAD, other).ids == second.ids


def test_a_completion_ends_with_its_stop_token_or_is_truncated(model):
    prompts = prompts_of([6, 14, 8, 3])
    out = sample(model, prompts, SamplingParams(40, n=8), [STOP, 7], PAD, torch.Generator().manual_seed(2))
    assert 0 < sum(out.truncated) < len(out.truncated)
    for ids, logps, truncated in zip(out.ids, out.logps, out.truncated, strict=True):
        assert len(ids) == len(logps)
        assert truncated == (ids[-1] not in (STOP, 7))
        assert not {STOP, 7} & set(ids[:-1])
        assert len(ids) == 40 if truncated else len(ids) <= 40


def test_min_p_is_relative_to_the_most_probable_token_in_narrow_and_wide_vocabularies():
    for vocabulary in (3, sampler.WIDE + 1):
        probs = torch.full((1, vocabulary), 1e-9)
        probs[0, :3] = torch.tensor([0.5, 0.3, 0.2])
        highest = torch.tensor([1 - 1e-12], dtype=torch.float64)
        drawn = [draw(probs.log(), highest, SamplingParams(1, min_p=p))[0].item() for p in (0.3, 0.5, 0.7)]
        assert drawn == [2, 1, 0]


def test_a_row_ends_where_it_is_said_to_and_the_others_do_not_notice(model):
    prompts = prompts_of([6, 14, 8])
    params, uniforms = SamplingParams(20), torch.rand(3, 20, dtype=torch.float64)
    whole = decode(model, prompts, params, [], PAD, uniforms)
    ended = decode(model, prompts, params, [], PAD, uniforms, lambda ids: ids == whole[1][0][:7])
    assert [ids for ids, _, _ in ended] == [whole[0][0], whole[1][0][:7], whole[2][0]]
    assert [cut for _, _, cut in ended] == [True, False, True]
    at_the_limit = decode(model, prompts, params, [], PAD, uniforms, lambda ids: len(ids) == 20)
    assert [cut for _, _, cut in at_the_limit] == [False] * 3


def test_each_prompt_is_prefilled_once_and_ended_rows_leave_the_batch(model, monkeypatch):
    prefilled, stepped = [], []
    network = type(model.base_model)
    forward, step = network.forward, StepDecoder.step

    def spy_forward(self, **inputs):
        prefilled.append(tuple(inputs["input_ids"].shape))
        return forward(self, **inputs)

    def spy_step(self, cache, tokens, positions, mask):
        stepped.append(len(tokens))
        return step(self, cache, tokens, positions, mask)

    monkeypatch.setattr(network, "forward", spy_forward)
    monkeypatch.setattr(StepDecoder, "step", spy_step)
    out = sample(model, prompts_of([6, 4]), SamplingParams(40, n=8), [STOP, 7], PAD, torch.Generator().manual_seed(2))
    assert prefilled == [(2, 6)]
    # Every token but the last of each row is fed once, and nothing after a row's end.
    assert sum(stepped) == sum(len(ids) - 1 for ids in out.ids)


def test_training_mode_is_restored(model):
    model.train()
    sample(model, prompts_of([4]), SamplingParams(2), [STOP], PAD)
    assert model.training
    model.eval()


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(InputError, match="no tokens"):
        sample(model, [[]], SamplingParams(2), [STOP], PAD)
