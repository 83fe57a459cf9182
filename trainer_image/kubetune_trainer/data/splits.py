"""Which files of a dataset repository are a split, and which records of it are a slice like train[:95%].

As the `datasets` library does it: the README's `configs` decide where there are any, otherwise the names of the files.
"""

import fnmatch
import itertools
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kubetune_trainer.data.read import SUFFIXES, is_data
from kubetune_trainer.errors import ConfigError, DataError

_SPLIT = re.compile(r"^(?P<name>[\w.-]+)(\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?$")
_SAME = {
    "train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation",
}  # fmt: skip
"""What files of a split may be called as well."""
_BETWEEN = r"[/_. \-\d]"
_SHARD = re.compile(r"^data/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}\D")
_OTHER_SPLITS = re.compile(r"(^|[/_.\-])(test|eval|evaluation|dev|valid|validation|val|holdout|heldout)([/_.\-]|\d|$)")

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split, or a part of it."""

    name: str
    """Its name."""
    begin: str | None = None
    """Where the part begins: a number of records or a percentage, negative from the end."""
    end: str | None = None
    """Where it ends."""

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Reads `train`, `train[:95%]` or `train[100:200]`.

        Raises:
            ConfigError: It is none of these.
        """
        match = _SPLIT.match(text)
        if not match:
            raise ConfigError(f"hub.split must be a name with an optional slice, as in train[:95%], got {text!r}")
        return cls(**match.groupdict())

    def cut(self, records: Callable[[], Iterator[Item]]) -> Iterator[Item]:
        """Yields the records of the part; percentages need a pass of their own to count."""
        needs_total = any(edge and ("%" in edge or edge.startswith("-")) for edge in (self.begin, self.end))
        total = sum(1 for _ in records()) if needs_total else None
        begin, end = _index(self.begin, total), _index(self.end, total)
        return itertools.islice(records(), begin or 0, end)


def split_files(
    paths: Sequence[str], *, card: Mapping[str, Any], config: str | None, split: str, repo: str
) -> list[str]:
    """Returns the files of a split, in order.

    Args:
        paths: All files of the repository.
        card: What its README says in its YAML head.
        config: Name of the configuration; None means the only or default one.
        split: Name of the split.
        repo: How messages call the repository.

    Raises:
        DataError: There is no such configuration or split.
    """
    files = sorted(path for path in paths if path.endswith(SUFFIXES))
    configs = [entry for entry in card.get("configs") or () if entry.get("data_files") or entry.get("data_dir")]
    if configs:
        found = _of_config(_choose_config(configs, config, repo=repo), files, split)
    else:
        found = _of_folder(config or "", files, split)
        if not found and config == "default":  # what the only configuration is called that nobody has described
            found = _of_folder("", files, split)
    if not found:
        shown = ", ".join(files[:8]) or "none"
        of_config = f" of config {config}" if config else ""
        raise DataError(f"dataset {repo} on the Hub has no files for split {split}{of_config}; its data files: {shown}")
    return found


def _choose_config(configs: Sequence[Mapping[str, Any]], name: str | None, *, repo: str) -> Mapping[str, Any]:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    if name is None and len(configs) > 1:
        flagged = [names[number] for number, entry in enumerate(configs) if entry.get("default")]
        name = flagged[0] if flagged else "default"
    if name is None:
        return configs[0]
    if name not in names:
        raise DataError(f"dataset {repo} on the Hub has the configs {', '.join(names)}; hub.config must be one of them")
    return configs[names.index(name)]


def _of_config(config: Mapping[str, Any], files: Sequence[str], split: str) -> list[str]:
    """Returns a configuration's files of a split: those its patterns name, or those of its folder by their names."""
    folder = config.get("data_dir") or "."
    if not config.get("data_files"):
        return _of_folder(folder, files, split)
    patterns = [f"{folder}/{pattern}" for pattern in _patterns(config["data_files"], split)]
    return [path for path in files if any(_matches(path, pattern) for pattern in patterns)]


def _patterns(data_files: Any, split: str) -> list[str]:
    """Returns a configuration's file patterns for a split; without names of splits all is `train`."""
    if isinstance(data_files, str):
        data_files = [data_files]
    if all(isinstance(entry, str) for entry in data_files):
        return data_files if split == "train" else []
    paths = [entry["path"] for entry in data_files if entry.get("split", "train") == split]
    return [path for entry in paths for path in ([entry] if isinstance(entry, str) else entry)]


def _of_folder(folder: str, files: Sequence[str], split: str) -> list[str]:
    """Returns the files of a split by their names below a folder, which may be a pattern; "" is the repository."""
    depth = len([part for part in folder.split("/") if part not in ("", ".")])
    names = {path: "/".join(path.split("/")[depth:]) for path in files if _matches(path, f"./{folder}/")}
    shards = {path: match["split"] for path, name in names.items() if (match := _SHARD.match(name))}
    if shards:
        return [path for path, of_split in shards.items() if of_split == split]
    of_split = re.compile(rf"(^|{_BETWEEN})({_SAME.get(split, re.escape(split))})({_BETWEEN}|$)")
    found = [path for path, name in names.items() if of_split.search(name)]
    if found or split != "train":
        return found
    return [path for path, name in names.items() if not _OTHER_SPLITS.search(name)]


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern means a file: itself, or data that it stands for. One that ends in a slash is a folder."""
    wanted = posixpath.normpath(f"{pattern}**" if pattern.endswith("/") else pattern)
    return path == wanted or (is_data(path) and _part_by_part(path.split("/"), wanted.split("/")))


def _part_by_part(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """As `glob`: `*` stays within a part of the path, `**` means any number of parts."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_part_by_part(path[number:], pattern[1:]) for number in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _part_by_part(path[1:], pattern[1:])


def _index(edge: str | None, total: int | None) -> int | None:
    if edge is None:
        return None
    number = int(edge.rstrip("%"))
    if total is None:
        return number
    if edge.endswith("%"):
        number = round(total * number / 100)
    return max(0, number + total) if number < 0 else number
