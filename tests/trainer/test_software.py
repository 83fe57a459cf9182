"""The digest of the software that makes an output: the same for the same software, another for any other."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kubetune_trainer import software
from kubetune_trainer.software import software_digest


def digest_in(package: Path) -> str:
    """The digest that a copy of the package tells of itself, in a process of its own."""
    told = subprocess.run(
        [sys.executable, "-c", "from kubetune_trainer.software import software_digest; print(software_digest())"],
        capture_output=True, text=True, check=True, timeout=120, env={"PYTHONPATH": str(package.parent)},
    )  # fmt: skip
    return told.stdout.strip()


def test_an_image_and_a_checkout_of_the_same_software_agree_and_a_changed_line_does_not(tmp_path: Path) -> None:
    image = tmp_path / "image" / "kubetune_trainer"
    shutil.copytree(software.PACKAGE, image, ignore=shutil.ignore_patterns("__pycache__"))
    recipes = next(folder for folder in software.recipe_folders() if folder.is_dir())
    shutil.copytree(recipes, image / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    digest = digest_in(image)
    assert digest == digest_in(software.PACKAGE)
    (image / "notes.txt").write_text("no part of what runs")
    assert digest_in(image) == digest
    with (image / "recipes" / "finetune.py").open("a") as stream:
        stream.write("# hacked\n")
    assert digest_in(image) != digest


def test_another_version_of_a_library_is_another_software(monkeypatch: pytest.MonkeyPatch) -> None:
    before = software_digest()
    found = list(software.metadata.distributions())
    more = SimpleNamespace(name="a_library", version="1.0")
    monkeypatch.setattr(software.metadata, "distributions", lambda: [*found, more])
    first = software_digest()
    more.name, more.version = "A-Library", "1.0"
    assert software_digest() == first != before
    more.version = "1.1"
    assert software_digest() != first
