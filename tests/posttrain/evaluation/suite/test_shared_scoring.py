"""What choices share is computed once, and every log-likelihood is that of its whole sequence by itself."""

from random import Random

import pytest
import torch

from gemma2.posttrain.evaluation.suite import shared_scoring
from gemma2.posttrain.evaluation.suite.encoding import TokenRequest
from gemma2.posttrain.evaluation.suite.shared_scoring import SharedScorer
from gemma2.posttrain.models.scorer import token_logps
from gemma2.posttrain.tiny.networks import random_model

WINDOW = 12


@pytest.fixture(scope="module")
def model():
    return random_model(3, sliding_window=WINDOW).eval()


def ids(random, count):
    return [random.randrange(4, 250) for _ in range(count)]


def rows_of(kind):
    """Rows with what they share: a stem; a stem and a beginning of the group; targets of different lengths; nothing."""
    random = Random(5)
    group = ids(random, 40) if kind in ("group", "equal") else []
    rows = []
    for number in range(7):
        stem = [2, *group, *ids(random, 3 if number == 2 else random.randint(5, 40))]
        if kind == "equal":  # one token each: the last token is no input, so a row is its stem alone
            rows.append([TokenRequest([*stem, token], 1) for token in (7, 9, 11)])
        elif kind == "contexts":  # the choice is inside the context, the ending is the same
            ending = ids(random, 4)
            rows.append([TokenRequest([*stem, *ids(random, n), *ending], 4) for n in (1, 2)])
        else:
            endings = [ids(random, n) for n in (1, 6, 3, 1)]
            endings[3] = [*endings[2], 8]  # begins like another choice
            rows.append([TokenRequest([*stem, *ending], len(ending)) for ending in endings])
    return rows


def alone(model, row):
    """Log-likelihood of each choice from its whole sequence, without anything shared."""
    prompts = [request.ids[: -request.targets] for request in row]
    endings = [request.ids[-request.targets :] for request in row]
    return [values.double().sum().item() for values in token_logps(model, prompts, endings)]


@pytest.mark.parametrize("kind", ["stem", "group", "equal", "contexts"])
def test_each_choice_has_the_log_likelihood_of_its_whole_sequence(model, kind):
    rows = rows_of(kind)
    for batch_size in (1, 4):
        found = [values for _, batch in SharedScorer(model, batch_size).group(rows) for values in batch]
        for row, values in zip(rows, found, strict=True):
            assert values == pytest.approx(alone(model, row), abs=1e-4)


def test_windows_count_positions_not_columns(model):
    """A choice behind three others is far from the stem in columns: a window over columns would hide the stem."""
    rows = rows_of("stem")
    wide = random_model(3, sliding_window=4096).eval()
    (_, [values]), *_ = SharedScorer(model, 1).group(rows)
    assert values == pytest.approx(alone(model, rows[0]), abs=1e-4)
    assert values != pytest.approx(alone(wide, rows[0]), abs=1e-3)  # the window does bite


def test_fewer_tokens_are_computed(model):
    rows = rows_of("group")
    scorer = SharedScorer(model, 1)
    list(scorer.group(rows))
    whole = sum(len(request.ids) - 1 for row in rows for request in row)
    assert scorer.computed < whole / 4


@pytest.mark.parametrize("done", [0, 1, 3, 4, 6])
def test_a_run_that_continues_computes_the_same_bits(model, monkeypatch, done):
    monkeypatch.setitem(shared_scoring.MOST_TOKENS, "cpu", 150)
    rows = rows_of("group")
    scorer = SharedScorer(model, 3)
    whole = {start + i: values for start, batch in scorer.group(rows) for i, values in enumerate(batch)}
    assert len(whole) == len(rows)
    rest = {start + i: values for start, batch in scorer.group(rows, done) for i, values in enumerate(batch)}
    assert rest == {number: whole[number] for number in rest}
    assert set(range(done, len(rows))) <= set(rest)
    assert len(rest) < len(rows) or done < 3


def test_everything_known_runs_nothing(model):
    scorer = SharedScorer(model, 3)
    assert list(scorer.group(rows_of("group"), 7)) == []
    assert scorer.computed == 0


def test_bf16_and_a_model_without_windows_are_scored(model):
    plain = random_model(1, layer_types=["full_attention"] * 2, sliding_window=4096).eval()
    rows = rows_of("group")
    found = [values for _, batch in SharedScorer(plain, 2).group(rows) for values in batch]
    assert found[0] == pytest.approx(alone(plain, rows[0]), abs=1e-4)
    half = random_model(1).to(torch.bfloat16).eval()
    found = [values for _, batch in SharedScorer(half, 2).group(rows) for values in batch]
    assert len(found) == len(rows)
