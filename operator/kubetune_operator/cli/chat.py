"""`kubetune chat`: talk to a model in a folder, with the recipe that generates text."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from kubetune_operator.cli.local import require_trainer
from kubetune_operator.cli.recipes import folder as recipes_folder
from kubetune_operator.errors import SpecError


def chat(model: Path, *, options: Sequence[str]) -> NoReturn:
    """Become the recipe `generate` in its conversation; this process ends with it.

    Args:
        model: A folder with a model.
        options: Further options of the recipe.

    Raises:
        SpecError: There is no such folder, or no torch in this environment.
    """
    require_trainer("kubetune chat")
    if not model.exists():
        raise SpecError(str(model), problems=["is not there; download the output of a job first"])
    recipe = recipes_folder() / "generate.py"
    os.execv(sys.executable, [sys.executable, "-P", str(recipe), "--model", str(model), "--chat", *options])  # noqa: S606 (our own recipe)
