"""`kubetune recipes`: what comes with kubetune can be listed, copied and changed."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cluster.paths import ROOT


def test_every_recipe_and_config_is_listed_with_a_sentence(kubetune: Any) -> None:
    lines = kubetune("recipes", "ls").out.splitlines()
    shown = {line.split()[0] for line in lines}
    assert shown == {
        path.relative_to(ROOT / "recipes").as_posix()
        for pattern in ("*.py", "configs/*.yaml")
        for path in (ROOT / "recipes").glob(pattern)
    }
    assert all(len(line.split()) > 1 for line in lines)


def test_a_recipe_is_copied_by_its_name(kubetune: Any, tmp_path: Path) -> None:
    assert kubetune("recipes", "cp", "finetune", tmp_path).out == f"{tmp_path}/finetune.py\n"
    assert (tmp_path / "finetune.py").read_text() == (ROOT / "recipes" / "finetune.py").read_text()
    assert ast.parse((tmp_path / "finetune.py").read_text())


def test_a_copy_may_have_another_name(kubetune: Any, tmp_path: Path) -> None:
    assert kubetune("recipes", "cp", "finetune.py", tmp_path / "new" / "mine.py").code == 0
    assert (tmp_path / "new" / "mine.py").is_file()


def test_nothing_is_overwritten(kubetune: Any, tmp_path: Path) -> None:
    (tmp_path / "finetune.py").write_text("mine")
    ran = kubetune("recipes", "cp", "finetune", tmp_path)
    assert (ran.code, "exists and is not overwritten" in ran.err) == (1, True)
    assert (tmp_path / "finetune.py").read_text() == "mine"


def test_an_unknown_name_is_told_the_known_ones(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("recipes", "cp", "nonsense", tmp_path)
    assert ran.code == 1
    assert ran.err.startswith("error: kubetune recipes: there is no nonsense; there are ")
    assert "finetune.py, " in ran.err


def test_listing_imports_neither_torch_nor_the_trainer() -> None:
    code = (
        "import sys; from kubetune_operator.cli import recipes; list(recipes.listed());"
        "print([name for name in ('torch', 'kubetune_trainer', 'kubernetes', 'kopf') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
