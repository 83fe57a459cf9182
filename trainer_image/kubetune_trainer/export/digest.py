"""One digest for a whole folder, so that a later job can tell whether it gets what was written."""

import hashlib
from pathlib import Path


def folder_digest(folder: Path) -> tuple[str, int]:
    """Return a digest of all files in a folder, by name and content, and their bytes together.

    The digest is `sha256:` and the SHA-256 of the lines that `sha256sum` prints for the files, sorted by path.
    """
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    lines = []
    for name, path in files:
        with path.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {name}\n")
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return f"sha256:{digest}", sum(path.stat().st_size for _, path in files)
