"""The cache holds the teacher's own distributions to fp16, survives kills, and is refused where it does not fit."""

import json
import shlex
import shutil

import pytest
import torch

from gemma2.cli.app import invoke
from gemma2.core.errors import InputError, UsageError
from gemma2.posttrain.distillation import teacher_cache as module
from gemma2.posttrain.distillation.divergence import Divergence, FullTarget, divergence_loss, head_of
from gemma2.posttrain.distillation.responses import collate, response_states
from gemma2.posttrain.distillation.teacher_cache import CachedTeacher, TeacherCache, run_cache
from gemma2.posttrain.models.loading import load_policy
from gemma2.posttrain.runs.run_directory import RunOptions
from gemma2.posttrain.schemas import DistillCacheConfig, DistillConfig
from gemma2.posttrain.tiny.networks import save_random, tiny_tokenizer

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}{'.' * (a + 1)}"}
    for a in range(4)
    for b in range(3)
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_random(root / "teacher", seed=3)
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return root


def configure(root, **fields):
    return DistillCacheConfig(teacher=root / "teacher", data=root / "data.jsonl", **({"top_k": 8} | fields))


@pytest.fixture(scope="module")
def cache(inputs):
    run_cache(configure(inputs, shard_rows=5), RunOptions(inputs / "cache"))
    return TeacherCache.open(inputs / "cache")


def test_the_buckets_are_the_teacher_s_own_distribution(inputs, cache):
    """Against transformers on each row by itself: k largest probabilities and one minus their sum, to fp16."""
    model, _ = load_policy(inputs / "teacher")
    assert len(cache.examples) == len(ROWS)
    for number, row in enumerate(cache.examples):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
        learned = [t - 1 for t, target in enumerate(row.mask) if target]
        probs = torch.softmax(logits[learned], -1)
        top, ids = probs.topk(8)
        found_ids, found = cache.lines(number)
        assert torch.equal(found_ids.long(), ids)
        expected = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1).log()
        torch.testing.assert_close(found.double(), expected, rtol=2**-10, atol=1e-4)


def test_a_row_is_the_conversation_with_its_answer_to_learn(cache):
    tokenizer = tiny_tokenizer()
    row = cache.examples[1]
    text = tokenizer.decode(row.ids)
    learned = tokenizer.decode([i for i, target in zip(row.ids, row.mask, strict=True) if target])
    assert text.startswith("<bos><start_of_turn>user\nWhat is 0 plus 1?")
    assert learned == "It is 1.<end_of_turn><eos>"


def test_the_batch_size_changes_nothing_beyond_fp16(inputs, cache, tmp_path):
    run_cache(configure(inputs, batch_size=1, shard_rows=100), RunOptions(tmp_path / "cache"))
    other = TeacherCache.open(tmp_path / "cache")
    assert other.examples == cache.examples
    for row in range(len(ROWS)):
        torch.testing.assert_close(other.lines(row)[1].float(), cache.lines(row)[1].float(), rtol=2**-10, atol=0)


def test_a_target_is_normalised_and_in_the_order_of_the_batch(cache):
    rows = [7, 2]
    ids, mask = collate([cache.examples[i] for i in rows], torch.device("cpu"))
    target = CachedTeacher(cache, Divergence("forward-kl")).target(ids, mask, torch.tensor(rows))
    torch.testing.assert_close(target.logps.exp().sum(-1), torch.ones(int(mask.sum())))
    assert torch.equal(target.ids, torch.cat([cache.lines(i)[0] for i in rows]).long())


def test_a_wide_cache_gives_the_loss_of_the_teacher_itself(inputs, tmp_path):
    """With k = V - 1 nothing is merged, only rounded."""
    run_cache(configure(inputs, top_k=511), RunOptions(tmp_path / "cache"))
    cache = TeacherCache.open(tmp_path / "cache")
    teacher, _ = load_policy(inputs / "teacher")
    student, _ = load_policy(save_random(tmp_path / "student", seed=4))
    ids, mask = collate(cache.examples, torch.device("cpu"))
    divergence = Divergence("reverse-kl")
    with torch.no_grad():
        hidden = response_states(student, ids, mask)
        live = FullTarget(response_states(teacher, ids, mask), head_of(teacher), divergence)
        expected = divergence_loss(hidden, head_of(student), live).values
        target = CachedTeacher(cache, divergence).target(ids, mask, torch.arange(len(ROWS)))
        found = divergence_loss(hidden, head_of(student), target).values
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_the_reported_tail_is_the_mass_outside_the_top_k(inputs, cache):
    tails = torch.cat([cache.lines(row)[1][:, -1] for row in range(len(ROWS))]).double().exp()
    assert cache.index["mean_tail_mass"] == pytest.approx(tails.mean().item(), rel=1e-9)
    assert 0 < cache.index["mean_tail_mass"] < 1
    assert cache.index["positions"] == len(tails)


@pytest.mark.parametrize("died_at", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_and_resumed_cache_has_the_bytes_of_an_uninterrupted_one(
    inputs, cache, tmp_path, monkeypatch, died_at
):
    write, calls = module.shard_tensors, []

    def die(model, rows, config):
        calls.append(len(rows))
        if len(calls) == died_at + 1:
            raise KeyboardInterrupt
        return write(model, rows, config)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "shard_tensors", die)
        run_cache(configure(inputs, shard_rows=5), RunOptions(tmp_path / "cache"))
    run_cache(configure(inputs, shard_rows=5), RunOptions(tmp_path / "cache", resume=True))
    for path in cache.files:
        assert (tmp_path / "cache" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_files_have_the_modes_that_the_umask_gives(cache):
    assert {oct(path.stat().st_mode & 0o777) for path in cache.files} == {"0o644"}


# --- refusals ---------------------------------------------------------------------------------------------------------


def student_of(inputs, **fields):
    return DistillConfig(model=inputs / "student", teacher_cache=inputs / "cache", **fields)


def test_a_student_with_another_template_is_refused(inputs, cache):
    tokenizer = tiny_tokenizer()
    cache.check(tokenizer, 512, student_of(inputs))
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    with pytest.raises(InputError, match=r"tokenizer of .*student"):
        cache.check(tokenizer, 512, student_of(inputs))


def test_a_student_whose_head_lacks_a_token_of_the_cache_is_refused(inputs, cache):
    with pytest.raises(InputError, match=f"has token {cache.index['highest_id']}"):
        cache.check(tiny_tokenizer(), cache.index["highest_id"], student_of(inputs))


def test_another_temperature_than_that_of_the_cache_is_refused(inputs, cache):
    with pytest.raises(UsageError, match="--distill-temperature 1"):
        cache.check(tiny_tokenizer(), 512, student_of(inputs, distill_temperature=2.0))


def test_a_file_that_changed_or_is_gone_is_named(inputs, cache, tmp_path):
    copy = shutil.copytree(cache.path, tmp_path / "copy")
    shard = next(copy.glob("topk-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=shard.name):
        TeacherCache.open(copy)
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        TeacherCache.open(copy)


def test_an_edited_index_is_refused_and_the_fix_makes_the_cache_again(inputs, cache, tmp_path):
    place = tmp_path / "cache"
    shutil.copytree(cache.path, place)
    index = json.loads((place / "cache.json").read_text())
    (place / "cache.json").write_text(json.dumps(index | {"distill_temperature": 3.0}))
    with pytest.raises(InputError, match=r"cache\.json was changed after it was written") as refused:
        TeacherCache.open(place)
    command = str(refused.value).partition("make it again: gemma2 ")[2]
    assert invoke([*shlex.split(command), "--quiet"]) == 0
    assert TeacherCache.open(place).index == cache.index


def test_a_directory_that_is_no_cache_is_refused(inputs):
    with pytest.raises(InputError, match="not an output of gemma2 distill cache"):
        TeacherCache.open(inputs / "teacher")


def test_a_top_k_of_the_whole_vocabulary_is_refused(inputs, tmp_path):
    with pytest.raises(UsageError, match="leaves no rest"):
        run_cache(configure(inputs, top_k=512), RunOptions(tmp_path / "out"))


def test_a_bad_row_is_named_with_its_line(inputs, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    config = DistillCacheConfig(teacher=inputs / "teacher", data=tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=r"data\.jsonl:2"):
        run_cache(config, RunOptions(tmp_path / "out"))
