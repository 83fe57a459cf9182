"""Whether a folder is what a job wrote, by the digest of its files.

    python -m kubetune_trainer.verify FOLDER-OR-URI [--digest sha256:…]

Without a digest the folder's own lineage.json says what it must be, and which file is not what it was. Exit codes: 0 it
is, 1 it is not, otherwise the trainer's own.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kubetune_trainer.errors import DataError, TrainerError
from kubetune_trainer.export.digest import digest_of, file_digests
from kubetune_trainer.names import LINEAGE_FILE
from kubetune_trainer.storage import Store, open_store


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found and returns the exit code."""
    parser = argparse.ArgumentParser(prog="kubetune_trainer.verify", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="a folder here, or s3://bucket/path, pvc://claim/path, file://path")
    parser.add_argument("--digest", help="what the digest must be; default: what lineage.json says")
    options = parser.parse_args(arguments)
    try:
        store = open_store(options.folder if "://" in options.folder else f"file://{options.folder}")
        found, problems = verify(store, digest=options.digest)
    except TrainerError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(error.exit_code)
    for problem in problems:
        sys.stderr.write(f"error: {options.folder}: {problem}\n")
    if not problems:
        sys.stdout.write(f"{options.folder}: {found}\n")
    return 1 if problems else 0


def verify(store: Store, *, digest: str | None = None) -> tuple[str, list[str]]:
    """Compute a folder's digest anew and compare it.

    Returns:
        The digest, and what is not as it must be: empty where all is.

    Raises:
        DataError: There is no such folder, or nothing says what it must be.
    """
    if not store.list():
        raise DataError(f"{store.uri()} has no files")
    wanted, files = (digest, None) if digest else _recorded(store)
    hashes = _hashes(store)
    found = digest_of(hashes)
    if found == wanted:
        return found, []
    return found, [f"the digest must be {wanted}, got {found}", *_differences(files or hashes, hashes)]


def _recorded(store: Store) -> tuple[str, Mapping[str, str]]:
    """What lineage.json says: the folder's digest, and the hash of each of its files."""
    lineage: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    if store.exists(LINEAGE_FILE):
        try:
            lineage = json.loads(store.read_bytes(LINEAGE_FILE))
            outputs = {output["name"]: output["digest"] for output in lineage.get("outputs", ())}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise DataError(f"{store.uri()}: {LINEAGE_FILE} is not what a job wrote ({problem})") from error
    if lineage.get("output") not in outputs:
        raise DataError(f"{store.uri()} has no {LINEAGE_FILE} that says its digest", hint="Give it with --digest.")
    return outputs[lineage["output"]], lineage.get("files", {})


def _hashes(store: Store) -> dict[str, str]:
    local = store.local_path()
    if local is not None:
        return file_digests(local)
    hashes = {}
    for info in store.list():
        with tempfile.TemporaryDirectory(prefix="kubetune-") as folder:  # one file at a time: a model may be large
            store.download(info.path, Path(folder) / info.path)
            hashes |= file_digests(Path(folder))
    return hashes


def _differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in wanted:
            yield f"{name} is not one of its files"
        elif wanted[name] != found[name]:
            yield f"{name} has changed"


if __name__ == "__main__":
    sys.exit(main())
