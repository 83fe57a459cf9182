"""`kubetune chat`: what it becomes, and what it says where it cannot."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.cli import recipes


def test_it_becomes_the_recipe_that_generates(kubetune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    became: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *command: became.append(command))
    kubetune("chat", tmp_path, "--temperature", "0.7")
    recipe = str(recipes.folder() / "generate.py")
    [(program, arguments)] = became
    assert program == sys.executable
    assert arguments[1:] == ["-P", recipe, "--model", str(tmp_path), "--chat", "--temperature", "0.7"]


def test_without_torch_it_says_what_to_install(kubetune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    ran = kubetune("chat", tmp_path)
    needed = "needs the trainer (kubetune_trainer, torch not found): pip install 'kubetune[trainer]'"
    assert (ran.code, ran.err) == (1, f"error: kubetune chat: {needed}\n")


def test_a_folder_that_is_not_there_is_told(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("chat", tmp_path / "none")
    assert ran.err == f"error: {tmp_path}/none: is not there; download the output of a job first\n"
