"""A tier that a machine cannot run is skipped with a reason, and never silently where all are asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.paths import ROOT

TEST = """
import os
import pytest
os.geteuid = lambda: 65534

@pytest.mark.cluster
def test_needs_a_node():
    raise AssertionError("it must not run")
"""


@pytest.mark.parametrize(
    ("every_tier", "code", "says"),
    [
        ("", 0, "1 skipped"),
        ("1", 1, "1 error"),
    ],
)
def test_without_root_a_node_is_skipped_or_missed(tmp_path: Path, every_tier: str, code: int, says: str) -> None:
    (tmp_path / "test_node.py").write_text(TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-ra",
        "-c",
        "pyproject.toml",
        "-p",
        "tests.conftest",
        str(tmp_path / "test_node.py"),
    ]
    environment = os.environ | {"KUBETUNE_EVERY_TIER": every_tier, "KUBETUNE_CLUSTER": "native"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert says in ran.stdout
    assert "a node needs root, or a Docker daemon" in ran.stdout
