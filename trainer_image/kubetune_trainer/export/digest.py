"""One digest for a whole folder, so that a later job, or a person, can tell whether it is what was written.

Needs the standard library alone; the operator's command line computes the same from a copy of this rule.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from kubetune_trainer.names import ABOUT_FILES


def folder_digest(folder: Path) -> tuple[str, int]:
    """Return a digest of all files in a folder, by name and content, and their bytes together.

    The digest is `sha256:` and the SHA-256 of the lines that `sha256sum` prints for the files, sorted by path. What
    tells about them, lineage.json and README.md, is not among them, so that the digest is of the model alone.
    """
    hashes = file_digests(folder)
    return digest_of(hashes), sum((folder / name).stat().st_size for name in hashes)


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, in hexadecimal, by its path there."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in ABOUT_FILES:
            with path.open("rb") as stream:
                found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def digest_of(hashes: Mapping[str, str]) -> str:
    """Return the digest of a folder whose files have these hashes."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
