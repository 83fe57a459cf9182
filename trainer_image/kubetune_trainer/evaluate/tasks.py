"""Tasks by name: lm_eval's own and those of the task files, with their data from local folders alone.

lm_eval has more than ten thousand task files, and reading all of them takes half a minute. Only the folders that
mention a name are read.
"""

import difflib
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import datasets
import lm_eval.tasks
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import Task
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry

from kubetune_trainer.config import EvalConfig, TaskFiles
from kubetune_trainer.errors import ConfigError, DataError, TrainerError
from kubetune_trainer.report import Report
from kubetune_trainer.storage import config_map_folder, download_tree, open_store, scratch_dir

FILE_READERS: Final = frozenset({"json", "csv", "parquet", "text", "arrow"})
"""What dataset_path may be where dataset_kwargs.data_files names files."""
_NAMES: Final = re.compile(r"^(?:task|group|tag)\s*:\s*[\"']?([\w.-]+)", re.MULTILINE)

FindDataset = Callable[[str, str | None], Path]
"""Returns the local folder of a dataset, by its path on the Hub and the name of its configuration."""


@dataclass(frozen=True, kw_only=True)
class LoadedTasks:
    """What is to be asked."""

    tasks: Mapping[str, Task]
    """Every single task, by name."""
    groups: Mapping[str, Group]
    """Groups of them, by name."""
    samples: Mapping[str, range]
    """Which samples of a task, where it is not all of them."""
    files: Mapping[str, Path]
    """Folders of task files, by name."""

    def for_lm_eval(self) -> dict[str, Any]:
        """Return them as `lm_eval.evaluate` takes them."""
        return {"tasks": dict(self.tasks), "groups": dict(self.groups)}


def load_tasks(config: EvalConfig, *, find_dataset: FindDataset, report: Report) -> LoadedTasks:
    """Load all tasks of a job with their data.

    Args:
        config: The job.
        find_dataset: Asked for every dataset of the Hub.
        report: Takes warnings.

    Raises:
        ConfigError: There is no task of that name, or it comes twice; names the nearest.
        DataError: A task file, or its data, is not what it should be.
    """
    files = {each.name: fetch_task_files(each, config=config) for each in config.task_files}
    finder = _TaskFinder(list(files.values()), find_dataset)
    datasets.config.HF_DATASETS_CACHE = scratch_dir() / "datasets-cache"
    datasets.disable_progress_bars()
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    samples: dict[str, range] = {}
    for number, asked in enumerate(config.tasks):
        place = f"{config.title}: tasks[{number}].name"
        seed_lm_eval(config.seed)  # some tasks put their choices into another order while they are loaded
        found = finder.load(asked.name, place=place)
        for name, task in found["tasks"].items():
            if name in tasks:
                raise ConfigError(f"{place} must not bring a task again, got {asked.name}, and {name} is there already")
            _set_fewshot(task, asked.num_fewshot, seed=config.seed, report=report)
            _check_fewshot(task, place=f"{config.title}: tasks[{number}]")
            tasks[name] = task
            if asked.limit is not None:
                samples[name] = range(min(asked.limit, len(task.eval_docs)))
        groups |= found.get("groups", {})
    return LoadedTasks(tasks=tasks, groups=groups, samples=samples, files=files)


def seed_lm_eval(seed: int) -> None:
    """Seed what tasks and metrics draw from, as lm_eval's own command line does."""
    random.seed(0)
    np.random.seed(seed)  # noqa: NPY002 (what they draw from)


def fetch_task_files(files: TaskFiles, *, config: EvalConfig) -> Path:
    """Copy a folder of task files to this machine; what Kubernetes puts around a ConfigMap's keys is left out.

    Raises:
        ConfigError: The ConfigMap is not mounted.
        DataError: The folder is empty.
    """
    folder = scratch_dir() / "task-files" / files.name
    shutil.rmtree(folder, ignore_errors=True)
    if files.config_map is not None:
        source = config_map_folder(files.config_map.name)
        folder.mkdir(parents=True)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.startswith(".."):
                shutil.copyfile(path, folder / path.name)
    elif files.uri is not None:
        download_tree(open_store(files.uri.location, s3=files.uri.s3 or config.storage.s3), "", folder)
    if not folder.is_dir() or not any(folder.rglob("*.yaml")):
        raise DataError(
            f"{config.title}: task_files {files.name} has no .yaml files",
            hint="Each task is a YAML file of lm_eval, with its data next to it.",
        )
    return folder


def _set_fewshot(task: Task, num_fewshot: int | None, *, seed: int, report: Report) -> None:
    """As lm_eval's command line: a task that is made for no examples keeps none."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 != num_fewshot:
        report("warning", message=f"task {task.task_name} is made for no solved examples; num_fewshot is not applied")
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _check_fewshot(task: Task, *, place: str) -> None:
    """Refuses more solved examples than there are, besides the question itself where they are of one split.

    Raises:
        ConfigError: There are not so many.
    """
    wanted, sampler = task.get_config("num_fewshot") or 0, getattr(task, "sampler", None)
    if not wanted or type(sampler) is not ContextSampler:
        return
    there = len(sampler.fewshot_docs()) - (task.config.fewshot_split == task.config.test_split)
    if there < wanted:
        raise ConfigError(f"{place}: task {task.task_name} has {there} solved examples, and num_fewshot is {wanted}")


class _TaskFinder:
    """Finds tasks by name, in one's own folders first."""

    def __init__(self, folders: Sequence[Path], find_dataset: FindDataset) -> None:
        self._folders = folders
        self._find_dataset = find_dataset
        self._library = Path(lm_eval.tasks.__file__).parent

    def load(self, name: str, *, place: str) -> dict[str, Any]:
        """Load a task, a group or a tag.

        Raises:
            ConfigError: There is none of that name.
        """
        for folders in self._places(name):
            manager = lm_eval.tasks.TaskManager(include_path=[*folders, *self._folders], include_defaults=False)
            manager._factory = _LocalFactory(self._find_dataset, own_folders=self._folders)  # noqa: SLF001 (no other way)
            if _is_whole(name, manager.task_index):
                with _translated(name):
                    return dict(manager.load([name]))
        near = difflib.get_close_matches(name, self._names(), n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "lm_eval's documentation lists its tasks."
        raise ConfigError(f"{place} must be a task of lm_eval or of task_files, got {name}", hint=hint)

    def _places(self, name: str) -> Iterator[list[Path]]:
        """Yield in which of the library's folders to look beside one's own: none, some, all."""
        yield []
        mentioning = self._mentioning(name)
        if mentioning:
            yield mentioning
        if mentioning or name in self._own_names:  # one's own group may have any of the library's tasks
            yield [self._library]

    def _mentioning(self, name: str) -> list[Path]:
        """Return which of the library's folders have a file in which the name stands."""
        pattern = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        parts = {path.relative_to(self._library).parts[0] for path, text in self._texts if pattern.search(text)}
        return [self._library / part for part in sorted(parts)]

    def _names(self) -> list[str]:
        return sorted({*self._own_names, *(name for _, text in self._texts for name in _NAMES.findall(text))})

    @cached_property
    def _own_names(self) -> set[str]:
        own = (path.read_text(errors="replace") for folder in self._folders for path in folder.rglob("*.yaml"))
        return {name for text in own for name in _NAMES.findall(text)}

    @cached_property
    def _texts(self) -> list[tuple[Path, str]]:
        """The library's files, read once and only if a name is not in one's own."""
        return [(path, path.read_text(errors="replace")) for path in self._library.rglob("*.yaml")]


class _LocalFactory(TaskFactory):  # type: ignore[misc]  # lm_eval has no types
    """Builds tasks whose data lie in local folders."""

    def __init__(self, find_dataset: FindDataset, *, own_folders: Sequence[Path]) -> None:
        super().__init__()
        self._find_dataset = find_dataset
        self._own_folders = own_folders

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        if isinstance(task_class := config.get("class"), type) and getattr(task_class, "DATASET_PATH", None):
            folder = self._find_dataset(task_class.DATASET_PATH, task_class.DATASET_NAME)
            config["class"] = type(task_class.__name__, (task_class,), {"DATASET_PATH": str(folder)})
        path = config.get("dataset_path")
        if path is None:
            return config
        folder = entry.yaml_path.parent if entry.yaml_path else None
        own = folder is not None and any(folder.is_relative_to(root) for root in self._own_folders)
        if own and path in FILE_READERS:
            config["dataset_kwargs"] = _with_local_files(config, folder)
        elif own and (folder / path).is_dir():
            config["dataset_path"] = str(folder / path)
        elif path not in FILE_READERS:
            config["dataset_path"] = str(self._find_dataset(path, config.get("dataset_name")))
        return config


def _is_whole(name: str, index: Mapping[str, Entry]) -> bool:
    """Whether a name is there with everything that it consists of."""
    return name in index and _has_its_parts(index[name].cfg or {}, index, within=name)


def _has_its_parts(group: Mapping[str, Any], index: Mapping[str, Entry], *, within: str) -> bool:
    parts = group.get("task")
    return not isinstance(parts, list) or all(_is_there(part, index, within=within) for part in parts)


def _is_there(part: Any, index: Mapping[str, Entry], *, within: str) -> bool:
    """Whether a part of a group is there: a name, a group inside it, or a task with settings or data of its own."""
    if not isinstance(part, Mapping):
        return part == within or _is_whole(str(part), index)
    if isinstance(part.get("task"), list):
        return _has_its_parts(part, index, within=within)
    name = part.get("task") or part.get("group")
    return "dataset_path" in part or "class" in part or name in (None, within) or _is_whole(str(name), index)


def _with_local_files(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return dataset_kwargs with data_files found next to the task's YAML.

    Raises:
        DataError: A file is not there.
    """
    given = dict(config.get("dataset_kwargs") or {})

    def local(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: local(of_split) for split, of_split in files.items()}
        if isinstance(files, list):
            return [local(file) for file in files]
        if not any(folder.glob(str(files))) if not Path(files).is_absolute() else not Path(files).exists():
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            raise DataError(
                f"task {config.get('task')}: dataset_kwargs.data_files names {files}, which is not next to its YAML",
                hint=f"There are: {there}.",
            )
        return str(folder / files)

    if "data_files" in given:
        given["data_files"] = local(given["data_files"])
    return given


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Say in our errors what is wrong with a task; lm_eval and datasets raise whatever comes up inside them."""
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        raise DataError(
            f"task {name} cannot be loaded: {type(error).__name__}: {error}",
            hint="Try it alone with lm_eval, or look at its YAML and its data.",
        ) from error
