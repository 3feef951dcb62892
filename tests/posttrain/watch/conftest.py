import pytest
from watched_folder import Folder


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "out")
    yield made
    made.released()
