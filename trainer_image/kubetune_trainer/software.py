"""The software that makes an output, by one digest that needs no registry: nothing in a pod knows its image's hash."""

import hashlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent


def recipe_folders() -> list[Path]:
    """Return where the recipes that come with the package may lie: in it, as in the image, or in the repository."""
    return [PACKAGE / "recipes", PACKAGE.parent.parent / "recipes"]


def software_digest() -> str:
    """Return a digest of the package, its recipes, Python and what is installed beside them, by name and version.

    It is `sha256:` and the SHA-256 of their lines: the hash of each source file as `sha256sum` prints it,
    `name==version` of each distribution, and the version of Python. An image, and a checkout, of the same lines has the
    same digest.
    """
    lines = "".join(f"{line}\n" for line in sorted({*_sources(), *_installed(), f"python {platform.python_version()}"}))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _sources() -> Iterator[str]:
    recipes = next((folder for folder in recipe_folders() if folder.is_dir()), None)
    for name, folder in (("kubetune_trainer", PACKAGE), ("recipes", recipes)):
        for path in sorted(folder.rglob("*.py")) if folder is not None else ():
            if folder is PACKAGE and recipes is not None and path.is_relative_to(recipes):
                continue
            hashed = hashlib.sha256(path.read_bytes()).hexdigest()
            yield f"{hashed}  {name}/{path.relative_to(folder).as_posix()}"


def _installed() -> Iterator[str]:
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
        if name not in {"", "kubetune"}:  # its sources are told already, and the image has them without a distribution
            yield f"{name}=={distribution.version}"
