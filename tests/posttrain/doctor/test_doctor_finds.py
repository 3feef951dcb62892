"""`gemma2 doctor`: each fault, made in a sound directory by one change, is found by the check that is for it."""

import pytest
from broken_models import BROKEN, SLOW, copy, in_bf16, manifest, remove, sharded

from gemma2.merging import MergeRequest, merge
from gemma2.posttrain.doctor.examination import MODEL_CHECKS, examine
from gemma2.posttrain.tiny.networks import save_random


@pytest.mark.parametrize(
    ("name", "kind", "status", "change", "message"), BROKEN, ids=[f"{one[0]}-{one[4]}" for one in BROKEN]
)
def test_a_directory_with_one_fault_is_found_by_its_check(sound, tmp_path, name, kind, status, change, message):
    path = copy(sound, kind, tmp_path)
    change(path)
    found = [one for one in examine([path], skip=SLOW) if one.name == name and one.status != "ok"]
    assert [one.status for one in found[:1]] == [status], list(examine([path], skip=SLOW))
    assert message in found[0].message
    assert found[0].fix and found[0].subject == str(path)


def test_every_check_of_a_file_has_a_broken_directory():
    elsewhere = {"attention", "loss", "scores"}  # tests below
    assert {check.name for check in MODEL_CHECKS} - elsewhere == {one[0] for one in BROKEN}


# --- sound directories give no warning --------------------------------------------------------------------------------


def folding(path):
    text = (path / "chat_template.jinja").read_text()
    fold = (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    )
    text = text.replace("{{ bos_token }}", "{{ bos_token }}" + fold)
    (path / "chat_template.jinja").write_text(
        text.replace("+ message['content'] | trim", "+ (system if loop.first else '') + message['content'] | trim")
    )


SOUND = {
    "plain": ("policy", lambda path: None),
    "sharded": ("policy", sharded),
    "bf16": ("policy", in_bf16),
    "with a manifest": ("policy", manifest()),
    "adapter": ("adapter", lambda path: None),
    "reward model": ("reward", lambda path: None),
    "template that folds system text": ("policy", folding),
    "pre-trained, without a template": ("policy", remove("chat_template.jinja")),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_directory_gives_no_warning(sound, tmp_path, name):
    kind, change = SOUND[name]
    path = copy(sound, kind, tmp_path)
    change(path)
    if name == "sharded":
        assert len(list(path.glob("*.safetensors"))) == 2
    found = list(examine([path], skip=SLOW))
    assert [one for one in found if one.status != "ok"] == []
    assert len(found) >= 4


def test_a_merge_is_sound(sound, tmp_path):
    save_random(tmp_path / "other", 3)
    merge(MergeRequest(method="linear", models=(sound / "policy", tmp_path / "other")), out=tmp_path / "merged")
    assert {one.status for one in examine([tmp_path / "merged"], skip=SLOW)} == {"ok"}
