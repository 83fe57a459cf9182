"""A model need not fit into memory to be quantized."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.paths import ROOT


def run(folder: Path, scheme: str) -> str:
    script = ROOT / "tests" / "trainer" / "quantize_memory.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(folder), scheme], check=True, capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'trainer_image'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return ran.stdout


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """A model of more than a gigabyte, removed at once: pytest would keep it."""
    run(tmp_path / "model", "")
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)


def test_quantizing_takes_no_more_memory_than_its_largest_tensor(model: Path) -> None:
    assert len(list(model.glob("*.safetensors"))) >= 4
    for scheme, bytes_per_weight in (("Int8WeightOnly", 1 + 1 / 4), ("Int4WeightOnly", 1 / 2 + 1 / 16)):
        found = json.loads(run(model, scheme))
        assert found["total"] > 1e9
        assert found["took"] <= found["largest"] * (1.3 * 4 + bytes_per_weight), scheme
