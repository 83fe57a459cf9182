"""`kubetune verify`: whether a folder of a model is what a job wrote, by the digest of its files.

The rule is that of `kubetune_trainer.export.digest`, for machines without torch; a test holds the two to each other.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kubetune_operator.cli.lineage import ABOUT_FILES, LINEAGE_FILE, Json, read_lineage
from kubetune_operator.errors import SpecError


def verify(folder: Path, *, digest: str | None) -> str:
    """Compute a folder's digest anew and compare it.

    Args:
        folder: An output of a job, here.
        digest: What it has to be; without it, what its lineage.json says.

    Returns:
        What was found, for people.

    Raises:
        SpecError: There is no such folder, nothing says what it has to be, or it is something else.
    """
    if not folder.is_dir():
        raise SpecError(str(folder), problems=["is no folder"])
    has_lineage = digest is None or (folder / LINEAGE_FILE).exists()
    lineage = read_lineage(folder) if has_lineage else {}
    expected = digest or recorded_digest(folder, lineage)
    hashes = hash_files(folder)
    found = digest_of(hashes)
    if found != expected:
        problems = [f"its digest has to be {expected}, got {found}", *_differences(lineage.get("files"), hashes)]
        raise SpecError(str(folder), problems=problems)
    return f"{folder}: {found}, {len(hashes)} file{'s' if len(hashes) != 1 else ''}"


def recorded_digest(folder: Path, lineage: Json) -> str:
    """The digest of the output that a folder is, as its lineage.json says.

    Raises:
        SpecError: It does not say.
    """
    outputs = lineage.get("outputs")
    for output in outputs if isinstance(outputs, list) else []:
        if isinstance(output, dict) and output.get("name") == lineage.get("output") and output.get("digest"):
            return str(output["digest"])
    raise SpecError(str(folder / LINEAGE_FILE), problems=["has no digest; say with --digest what it has to be"])


def hash_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder, by its path there, but not of what tells about them."""
    hashes = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in ABOUT_FILES:
            with path.open("rb") as stream:
                hashes[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def digest_of(hashes: Mapping[str, str]) -> str:
    """The digest of a folder: of the lines that `sha256sum` prints for its files, sorted by path."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _differences(recorded: Any, hashes: Mapping[str, str]) -> Iterator[str]:
    """Which files are not what they were, as far as that was written down."""
    if not isinstance(recorded, dict):
        return
    for name in sorted(recorded.keys() | hashes.keys()):
        if name not in hashes:
            yield f"{name} is missing"
        elif name not in recorded:
            yield f"{name} is not one of its files"
        elif recorded[name] != hashes[name]:
            yield f"{name} has changed"
