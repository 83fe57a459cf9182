"""The recipes and configs that come with kubetune: scripts and complete configs, there to be copied and changed."""

import ast
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kubetune_operator.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe or a config.

    Attributes:
        name: As `recipes ls` prints it: finetune.py, configs/lora.yaml.
        path: Where it is.
        summary: Its first sentence.
    """

    name: str
    path: Path
    summary: str


def folder() -> Path:
    """The folder of recipes: inside the installed package, or beside it in a checkout.

    Raises:
        SpecError: kubetune is installed without its recipes.
    """
    # Found, not imported: the trainer's package may need torch, this does not.
    spec = importlib.util.find_spec("kubetune_trainer")
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    for candidate in (package / "recipes", package.parent.parent / "recipes"):
        if any(candidate.glob("*.py")):
            return candidate
    raise SpecError(
        "kubetune recipes", problems=["this installation has no recipes; install the kubetune distribution again"]
    )


def listed() -> Iterator[Entry]:
    """Every recipe, then every config."""
    root = folder()
    for path in (*sorted(root.glob("*.py")), *sorted(root.glob("configs/*.yaml"))):
        yield Entry(name=path.relative_to(root).as_posix(), path=path, summary=_summary(path))


def copy(name: str, *, destination: Path) -> Path:
    """Copy a recipe or config to a file or into a folder; returns the new file.

    Raises:
        SpecError: There is no such recipe, or the file exists.
    """
    found = {entry.name: entry.path for entry in listed()}
    source = next(
        (found[each] for each in (name, f"{name}.py", f"configs/{name}", f"configs/{name}.yaml") if each in found), None
    )
    if source is None:
        raise SpecError("kubetune recipes", problems=[f"there is no {name}; there are {', '.join(found)}"])
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise SpecError("kubetune recipes", problems=[f"{target} exists and is not overwritten"])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise SpecError("kubetune recipes", problems=[f"{target} cannot be written: {error.strerror}"]) from error
    return target


def _summary(path: Path) -> str:
    """The first line of a script's docstring or of a config's opening comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    first = text.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
