"""What an empty cache asks of the machine before anything is built."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cluster import images, local


@pytest.mark.parametrize("free", [local.FIRST_TIME_BYTES - 1, 0])
def test_an_empty_cache_on_a_full_disk_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int
) -> None:
    monkeypatch.setattr(images, "STORE", tmp_path / "none")
    monkeypatch.setattr(local, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(RuntimeError, match=r"the first time needs 30 GB of free disk at .*cache, got \d+ GB"):
        local._check_disk()


def test_a_cache_that_has_images_asks_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "STORE", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    local._check_disk()
