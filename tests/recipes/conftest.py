"""What the recipes' tests share: a process that forks ranks, a tiny model with data, and an S3 server."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from tests.recipes.gang import Zygote
from tests.recipes.tiny import write_messages, write_model, write_preferences
from tests.s3 import s3_server as moto


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    running = Zygote()
    yield running
    running.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data of every kind."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    write_messages(folder / "pairs.jsonl", samples=40, seed=1)
    write_messages(folder / "more.jsonl", samples=25, seed=2)
    write_preferences(folder / "preferences.jsonl", samples=20, seed=3)
    return folder


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A fresh folder with the model and the data, and nothing of the runs that others made in theirs."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    for path in tiny.glob("*.jsonl"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with moto() as server:
        yield server
