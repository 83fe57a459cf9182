"""Which files of a dataset repository are a split, and which records of it are a slice like train[:95%].

As the `datasets` library does it: the README's `configs` decide where there are any, otherwise the names of the files.
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kubetune_trainer.data.read import SUFFIXES
from kubetune_trainer.errors import ConfigError, DataError

_SPLIT = re.compile(r"^(?P<name>[\w.-]+)(\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?$")
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
    configs = [entry for entry in card.get("configs") or () if entry.get("data_files")]
    if configs:
        patterns = _patterns(_choose_config(configs, config, repo=repo), split)
        found = [path for path in files if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]
    else:
        found = _by_name([path for path in files if config is None or path.startswith(f"{config}/")], split)
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


def _patterns(config: Mapping[str, Any], split: str) -> list[str]:
    """Returns a configuration's file patterns for a split; without names of splits all is `train`."""
    data_files = config["data_files"]
    if isinstance(data_files, str):
        data_files = [data_files]
    if all(isinstance(entry, str) for entry in data_files):
        return data_files if split == "train" else []
    paths = [entry["path"] for entry in data_files if entry.get("split", "train") == split]
    return [path for entry in paths for path in ([entry] if isinstance(entry, str) else entry)]


def _by_name(paths: Sequence[str], split: str) -> list[str]:
    named = re.compile(rf"(^|[/_.\-]){re.escape(split)}([/_.\-]|$)")
    found = [path for path in paths if named.search(path)]
    if found or split != "train":
        return found
    return [path for path in paths if not _OTHER_SPLITS.search(path)]


def _index(edge: str | None, total: int | None) -> int | None:
    if edge is None:
        return None
    number = int(edge.rstrip("%"))
    if total is None:
        return number
    if edge.endswith("%"):
        number = round(total * number / 100)
    return max(0, number + total) if number < 0 else number
