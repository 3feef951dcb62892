"""Divergences against numbers worked out by hand and against autograd on whole logits, in value and in gradient."""

import math

import pytest
import torch

from gemma2.posttrain.distillation import divergence as module
from gemma2.posttrain.distillation.divergence import Divergence, FullTarget, Head, TopkTarget, divergence_loss, head_of
from gemma2.posttrain.distillation.responses import response_states
from gemma2.posttrain.tiny.networks import random_model

KINDS = [("forward-kl", 0.5), ("reverse-kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]
POSITIONS, VOCABULARY = 11, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three positions a chunk: 11 positions leave a last chunk that is not full."""
    monkeypatch.setattr(module, "CHUNK", 3 * VOCABULARY)


def between(kind, beta, teacher, student):
    """The divergence of two distributions given as probabilities."""
    logps = torch.tensor([student], dtype=torch.float64).log()
    values, _ = Divergence(kind, beta)(logps, logps.exp(), torch.tensor([teacher], dtype=torch.float64).log())
    return values.item()


def random_head(rows, width, seed):
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def direct(kind, beta, student, teacher):
    """The definitions, on whole log-probs (N, V), by autograd."""
    s, t = student.exp(), teacher.exp()
    if kind == "forward-kl":
        return (t * (teacher - student)).sum(-1)
    if kind == "reverse-kl":
        return (s * (student - teacher)).sum(-1)
    mixture = (beta * t + (1 - beta) * s).log()
    return beta * (t * (teacher - mixture)).sum(-1) + (1 - beta) * (s * (student - mixture)).sum(-1)


def log_softmax(hidden, head):
    logits = hidden @ head.weight.T
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return torch.log_softmax(logits / head.temperature, -1)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_divergences_of_two_coins():
    """T = (1/2, 1/2), S = (3/4, 1/4); m = (5/8, 3/8) at b = 1/2."""
    t, s = [0.5, 0.5], [0.75, 0.25]
    assert between("forward-kl", 0.5, t, s) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert between("reverse-kl", 0.5, t, s) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    to_teacher = 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    to_student = 0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)
    assert between("jsd", 0.5, t, s) == pytest.approx(0.5 * to_teacher + 0.5 * to_student)


def test_beta_is_the_weight_of_the_teacher():
    """b = 1/4: m = (11/16, 5/16)."""
    t, s = [0.5, 0.5], [0.75, 0.25]
    to_teacher = 0.5 * math.log(8 / 11) + 0.5 * math.log(8 / 5)
    to_student = 0.75 * math.log(12 / 11) + 0.25 * math.log(4 / 5)
    assert between("jsd", 0.25, t, s) == pytest.approx(0.25 * to_teacher + 0.75 * to_student)


def test_the_limits_of_jsd_in_beta_are_the_two_kls():
    """GKD, section 2: JSD(b) / b -> forward KL for b -> 0; by symmetry JSD(b) / (1 - b) -> reverse KL for b -> 1."""
    t, s, small = [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], 1e-6
    assert between("jsd", small, t, s) / small == pytest.approx(between("forward-kl", 0.5, t, s), rel=1e-5)
    assert between("jsd", 1 - small, t, s) / small == pytest.approx(between("reverse-kl", 0.5, t, s), rel=1e-5)


def test_jsd_is_bounded_where_the_kls_are_not():
    t, s = [1 - 1e-30, 1e-30], [1e-30, 1 - 1e-30]
    assert between("forward-kl", 0.5, t, s) > 60
    assert between("jsd", 0.5, t, s) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_equal_distributions_have_exactly_no_divergence_and_no_gradient(kind, beta):
    logps = torch.log_softmax(torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 5, -1)
    values, gradient = Divergence(kind, beta)(logps.clone(), logps.exp(), logps.clone())
    assert torch.equal(values, torch.zeros(5))
    assert torch.equal(gradient, torch.zeros(5, 1000))


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_distributions_a_hundred_nats_apart_stay_finite(kind, beta):
    student = torch.log_softmax(torch.tensor([[0.0, 150.0, -150.0]]), -1)
    teacher = torch.log_softmax(torch.tensor([[0.0, -150.0, 150.0]]), -1)
    values, gradient = Divergence(kind, beta)(student, student.exp(), teacher)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


# --- the chunked loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_loss_and_gradients_are_those_of_whole_logits(kind, beta, cap, temperature):
    hidden, weight = (random_head(n, 8, seed).requires_grad_() for n, seed in ((POSITIONS, 0), (VOCABULARY, 1)))
    teacher = Head(random_head(VOCABULARY, 6, 2), cap, temperature)
    states = random_head(POSITIONS, 6, 3)
    head = Head(weight, cap, temperature)
    measured = divergence_loss(hidden, head, FullTarget(states, teacher, Divergence(kind, beta)), 1 / POSITIONS)
    found = torch.autograd.grad(measured.loss, (hidden, weight))

    values = direct(kind, beta, log_softmax(hidden, head), log_softmax(states, teacher))
    expected = torch.autograd.grad(values.mean(), (hidden, weight))
    torch.testing.assert_close(measured.values, values.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(measured.loss.detach(), values.mean().detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_gradient_follows_what_is_done_with_the_loss(factor):
    hidden, weight = random_head(POSITIONS, 8, 0).requires_grad_(), random_head(VOCABULARY, 8, 1).requires_grad_()
    target = FullTarget(random_head(POSITIONS, 8, 2), Head(random_head(VOCABULARY, 8, 3), None), Divergence("jsd"))
    whole = torch.autograd.grad(divergence_loss(hidden, Head(weight, None), target).loss, weight)[0]
    part = torch.autograd.grad(divergence_loss(hidden, Head(weight, None), target).loss * factor, weight)[0]
    torch.testing.assert_close(part, whole * factor)


def test_a_frozen_head_gets_no_gradient_and_its_hidden_states_do():
    hidden, weight = random_head(POSITIONS, 8, 0).requires_grad_(), random_head(VOCABULARY, 8, 1)
    target = FullTarget(random_head(POSITIONS, 8, 2), Head(random_head(VOCABULARY, 8, 3), None), Divergence("jsd"))
    divergence_loss(hidden, Head(weight, None), target).loss.backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_the_chunk_size_does_not_change_the_result(monkeypatch):
    hidden, weight = random_head(POSITIONS, 8, 0).requires_grad_(), random_head(VOCABULARY, 8, 1).requires_grad_()
    target = FullTarget(random_head(POSITIONS, 8, 2), Head(random_head(VOCABULARY, 8, 3), 3.0), Divergence("jsd"))

    def gradients():
        return torch.autograd.grad(divergence_loss(hidden, Head(weight, 3.0), target).loss, (hidden, weight))

    in_chunks = gradients()
    monkeypatch.setattr(module, "CHUNK", 10**6)
    torch.testing.assert_close(gradients(), in_chunks)


def test_entropies_are_those_of_the_student():
    hidden, head = random_head(POSITIONS, 8, 0), Head(random_head(VOCABULARY, 8, 1), 3.0)
    target = FullTarget(random_head(POSITIONS, 8, 2), head, Divergence("forward-kl"))
    logps = log_softmax(hidden, head)
    torch.testing.assert_close(divergence_loss(hidden, head, target).entropies, -(logps.exp() * logps).sum(-1))


def test_a_bf16_teacher_on_the_cpu_is_read_in_fp32():
    """Its weights are rounded, its logits are not."""
    weight, states = random_head(VOCABULARY, 6, 0).bfloat16(), random_head(POSITIONS, 6, 1).bfloat16()
    expected = states.float() @ weight.float().T
    assert torch.equal(Head(weight, None).logits(states), expected)
    assert not torch.equal((states @ weight.T).float(), expected)


@pytest.mark.parametrize("cap", [30.0, None])
def test_the_head_of_a_model_gives_the_model_s_own_logits(cap):
    model = random_model(final_logit_softcapping=cap)
    ids = torch.tensor([[2, 5, 9, 300, 7]])
    own = model(input_ids=ids).logits[0, :-1]
    states = response_states(model, ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(head_of(model).logits(states), own, rtol=1e-5, atol=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    model = random_model()
    ids, mask = torch.tensor([[2, 5, 9, 300, 7]]), torch.tensor([[False, False, True, True, True]])
    for kind, beta in KINDS:
        hidden = response_states(model, ids, mask)
        target = FullTarget(hidden.detach(), head_of(model), Divergence(kind, beta))
        loss = divergence_loss(hidden, head_of(model), target).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert loss.item() == 0
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


# --- top k and the rest -----------------------------------------------------------------------------------------------


def topk_case(k, seed=0):
    """A student, a teacher's log-probs (N, V), and the k most probable of them with the rest in one bucket."""
    hidden, weight = random_head(POSITIONS, 8, seed), random_head(VOCABULARY, 8, seed + 1)
    teacher = torch.log_softmax(random_head(POSITIONS, VOCABULARY, seed + 2) * 2, -1)
    top, ids = teacher.topk(k)
    rest = teacher.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return hidden.requires_grad_(), weight, teacher, ids, torch.cat([top, rest], -1)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_buckets_are_compared_like_tokens(kind, beta):
    hidden, weight, _, ids, logps = topk_case(5)
    head = Head(weight, 3.0, 1.5)
    measured = divergence_loss(hidden, head, TopkTarget(ids, logps, Divergence(kind, beta)), 0.5)
    student = log_softmax(hidden, head)
    top = student.gather(1, ids)
    buckets = torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], -1)
    values = direct(kind, beta, buckets, logps)
    torch.testing.assert_close(measured.values, values.detach(), rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(values.sum() * 0.5, hidden)
    torch.testing.assert_close(torch.autograd.grad(measured.loss, hidden), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_buckets_never_raise_a_divergence(kind, beta):
    for k in (1, 5, 20, VOCABULARY - 1):
        hidden, weight, teacher, ids, logps = topk_case(k)
        head = Head(weight, None)
        coarse = divergence_loss(hidden, head, TopkTarget(ids, logps, Divergence(kind, beta))).values
        fine = direct(kind, beta, log_softmax(hidden, head), teacher).detach()
        assert (coarse <= fine + 1e-12).all()
        if k == VOCABULARY - 1:  # the rest is one token
            torch.testing.assert_close(coarse, fine)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_what_is_lost_of_the_forward_kl_is_what_the_docstring_says(k):
    """r KL(T_tail || S_tail) in value, r |T_tail - S_tail|_1 <= 2 r in the gradient; r: the teacher's tail mass."""
    hidden, weight, teacher, ids, logps = topk_case(k)
    student = log_softmax(hidden, Head(weight, None)).detach()
    outside = torch.ones_like(teacher, dtype=torch.bool).scatter(1, ids, False)
    r = (teacher.exp() * outside).sum(-1, keepdim=True)
    t_tail = teacher.exp() * outside / r
    s_tail = student.exp() * outside / (student.exp() * outside).sum(-1, keepdim=True)
    lost = r.squeeze(1) * torch.special.xlogy(t_tail, t_tail / s_tail.where(outside, 1.0)).sum(-1)

    kl = Divergence("forward-kl")
    coarse, slope = TopkTarget(ids, logps, kl).compare(slice(None), student.clone(), student.exp())
    fine, exact = kl(student.clone(), student.exp(), teacher.clone())
    torch.testing.assert_close(fine - coarse, lost)
    off = (exact - slope).abs().sum(-1)
    torch.testing.assert_close(off, r.squeeze(1) * (t_tail - s_tail).abs().sum(-1))
    assert (off <= 2 * r.squeeze(1)).all()
