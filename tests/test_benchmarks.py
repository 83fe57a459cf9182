"""Every side of every benchmark whose libraries are here runs for one small step, so that the tables stay runnable."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.tiny import write_model

FOLDER = Path(__file__).parent.parent / "benchmarks"
TABLES = ("lora", "sft", "full", "mfu", "packing", "loss", "load", "decode")
SMALL = {"steps": 1, "batch": 2, "rows": 1, "length": 16, "tokens": 8, "prompt": 4, "vocabulary": 50, "width": 8}
SMALL |= {"samples": 4, "threads": 1, "rank": 2}


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("benchmarks") / "model"))
