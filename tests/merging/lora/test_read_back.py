"""An adapter is read back from the disk before it appears: other bytes than were written are refused by tensor."""

import pytest
from test_extraction import extract, models

from gemma2.core.errors import OutputError
from gemma2.core.outputs.hashing import digest_file
from gemma2.core.outputs.manifest import read_manifest
from gemma2.core.outputs.safetensors_header import read_header
from gemma2.merging.lora.adapter_files import AdapterWriter


def damaging(monkeypatch, damage):
    """Every adapter is damaged when it is finished."""
    finish = AdapterWriter.finish

    def finish_and_damage(self):
        finish(self)
        damage(self._path)

    monkeypatch.setattr(AdapterWriter, "finish", finish_and_damage)


@pytest.mark.parametrize("which", [0, -1])
def test_a_changed_byte_is_refused_by_the_name_of_its_tensor_and_nothing_appears(tmp_path, monkeypatch, which):
    names = []

    def flip(path):
        tensor = list(read_header(path).values())[which]
        names.append(tensor.name)
        with path.open("r+b") as file:
            file.seek(tensor.offset + tensor.nbytes - 1)
            byte = file.read(1)
            file.seek(tensor.offset + tensor.nbytes - 1)
            file.write(bytes([byte[0] ^ 1]))

    damaging(monkeypatch, flip)
    with pytest.raises(OutputError) as caught:
        extract(models(tmp_path), save_modules=("all",))
    assert f"{names[0]} reads back with other bytes" in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_another_header_is_refused(tmp_path, monkeypatch):
    def rename(path):
        path.write_bytes(path.read_bytes().replace(b"layers.0.", b"layers.Z.", 1))

    damaging(monkeypatch, rename)
    with pytest.raises(OutputError, match="reads back with other tensors"):
        extract(models(tmp_path), save_modules=("all",), target_modules=("up_proj",))


def test_the_manifest_has_the_digest_of_the_file_that_was_read_back(tmp_path):
    extract(models(tmp_path), save_modules=("all",))
    found = read_manifest(tmp_path / "adapter")["files"]["adapter_model.safetensors"]["digest"]
    assert found == digest_file(tmp_path / "adapter/adapter_model.safetensors")
