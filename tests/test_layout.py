"""The rules that hold the tree in shape: what may be named how, imported where, and how long a recipe may be."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.order import LONGEST_FIRST

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
REGISTRY_HOSTS = (
    "pypi" + ".org", "python" + "hosted.org", "proxy.golang" + ".org", "registry.npmjs" + ".org",
    "crates.io" + "/api", "deb.debian" + ".org",
)  # fmt: skip


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "start",
    [
        ["-c", "import operator; print(operator.__file__)"],
        ["-c", "import kubetune_operator, operator; print(operator.__file__)"],
        ["-c", "import kubetune_trainer, operator; print(operator.__file__)"],
    ],
    ids=["plain", "after the operator package", "after the trainer package"],
)
def test_the_stdlib_operator_module_is_intact_from_the_root(start: list[str]) -> None:
    printed = subprocess.run([sys.executable, *start], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert Path(printed.strip()).parent == Path(sys.modules["os"].__file__ or "").parent


def test_the_operator_folder_is_no_package_and_holds_no_loose_module() -> None:
    assert not [path.name for path in (ROOT / "operator").glob("*.py")]


def test_no_folder_under_tests_is_called_operator() -> None:
    assert not [path for path in (ROOT / "tests").rglob("operator") if path.is_dir()]


def test_no_module_is_named_like_one_of_the_stdlib() -> None:
    packages = (ROOT / "operator" / "kubetune_operator", ROOT / "trainer_image" / "kubetune_trainer")
    names = {path.stem for package in packages for path in package.rglob("*.py")} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names


def test_the_order_of_tests_names_files_that_are_there() -> None:
    assert not [name for name in LONGEST_FIRST if not (ROOT / "tests" / name).is_file()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_under_600_lines_and_has_no_trainer_class(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.count("\n") < 600
    assert not re.search(r"^class \w*(Trainer|Recipe)\b", text, re.MULTILINE)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_how_to_start_it_in_two_ways_and_what_it_can_do(recipe: Path) -> None:
    told = ast.get_docstring(ast.parse(recipe.read_text())) or ""
    commands = [line.split("#")[0].split() for line in told.splitlines() if line.startswith("    ")]
    ways = [command for command in commands if command[0] in {"torchrun", "python", "kubetune"}]
    assert len(ways) >= 2, "commands, each a line that is set in"
    assert f"recipes/{recipe.name}" in {word for command in ways for word in command}
    for word in (word for command in ways for word in command if word.startswith(("recipes/", "examples/"))):
        assert (ROOT / word).is_file(), word
    [features] = [part for part in told.split("\n\n") if part.startswith("Features: ")]
    assert features.count(";") >= 2


def test_recipes_are_scripts_and_not_a_package() -> None:
    assert RECIPES
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_no_file_names_the_host_of_a_package_registry() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {host}" for host in REGISTRY_HOSTS if host in text]
    assert not found


def test_each_crd_is_small_enough_for_kubectl_apply() -> None:
    for path in (ROOT / "crds").glob("*.yaml"):
        assert path.stat().st_size < 200_000, path.name


def test_the_wheel_carries_both_packages_and_the_recipes_and_nothing_else(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder  # noqa: PLC0415 (a build tool, needed here alone)

    built = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    names = zipfile.ZipFile(built).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"kubetune_operator", "kubetune_trainer"} == {top for top in tops if not top.endswith(".dist-info")}
    assert "kubetune_trainer/recipes/finetune.py" in names
    assert any(name.startswith("kubetune_trainer/recipes/configs/") for name in names)
    assert not [name for name in names if name.startswith("tests") or name.endswith(".pyc")]
