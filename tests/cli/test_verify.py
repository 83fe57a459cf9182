"""`kubetune verify`: a folder that is what was written, and folders that are not."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.cli.verify import digest_of, hash_files
from kubetune_trainer.export.digest import folder_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output with its lineage, which names another output too."""
    made = tmp_path / "downloaded"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "sub" / "model.safetensors").write_bytes(bytes(range(256)))
    hashes = hash_files(made)
    outputs = [{"name": "adapter", "digest": "sha256:0"}, {"name": "merged", "digest": digest_of(hashes)}]
    lineage = {"kind": "FineTuneJob", "name": "a", "outputs": outputs, "output": "merged", "files": hashes}
    (made / "lineage.json").write_text(json.dumps(lineage))
    return made


def test_the_rule_is_that_of_the_trainer_and_of_sha256sum(folder: Path) -> None:
    digest = digest_of(hash_files(folder))
    assert folder_digest(folder)[0] == digest
    (folder / "lineage.json").unlink()
    command = "find . -type f | sed 's|^./||' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    assert f"sha256:{subprocess.check_output(['bash', '-c', command], cwd=folder, text=True).split()[0]}" == digest


def test_a_folder_that_is_as_it_was_written_passes(kubetune: Any, folder: Path) -> None:
    ran = kubetune("verify", folder)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{folder}: {digest_of(hash_files(folder))}, 2 files\n"


CHANGES: dict[str, tuple[Any, list[str]]] = {
    "a byte": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json has changed"]),
    "a file more": (lambda folder: (folder / "extra.txt").touch(), ["extra.txt is not one of its files"]),
    "a file less": (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
    "another name": (
        lambda folder: (folder / "config.json").rename(folder / "sub" / "config.json"),
        ["config.json is missing", "sub/config.json is not one of its files"],
    ),
}


@pytest.mark.parametrize(("change", "told"), CHANGES.values(), ids=CHANGES)
def test_what_is_not_the_same_is_named(kubetune: Any, folder: Path, change: Any, told: list[str]) -> None:
    expected = digest_of(hash_files(folder))
    change(folder)
    ran = kubetune("verify", folder)
    assert (ran.code, ran.out) == (1, "")
    first = f"error: {folder}: its digest has to be {expected}, got {digest_of(hash_files(folder))}"
    assert ran.err.splitlines() == [first, *(f"error: {folder}: {each}" for each in told)]


def test_a_digest_may_be_given(kubetune: Any, folder: Path) -> None:
    digest = digest_of(hash_files(folder))
    assert kubetune("verify", folder, "--digest", "sha256:1").code == 1
    (folder / "lineage.json").unlink()
    assert kubetune("verify", folder, "--digest", digest).out == f"{folder}: {digest}, 2 files\n"
    assert kubetune("verify", folder, "--digest", "sha256:1").code == 1


@pytest.mark.parametrize(
    ("lineage", "problem"),
    [
        (None, "has no lineage.json: no job of kubetune wrote it"),
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ("{}", "has no digest; say with --digest what it has to be"),
    ],
)
def test_a_folder_of_which_nothing_is_known_is_no_success(
    kubetune: Any, folder: Path, lineage: str | None, problem: str
) -> None:
    (folder / "lineage.json").unlink()
    if lineage is not None:
        (folder / "lineage.json").write_text(lineage)
    ran = kubetune("verify", folder)
    assert ran.code == 1
    assert problem in ran.err


def test_what_is_no_folder_is_told(kubetune: Any, tmp_path: Path) -> None:
    assert kubetune("verify", tmp_path / "none").err == f"error: {tmp_path}/none: is no folder\n"
