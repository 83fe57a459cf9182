"""Reading a config file: overrides, defaults of runs by hand, and every broken rule named at once."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kubetune_trainer.config.blocks import JobConfig
from kubetune_trainer.config.evaluate import EvalConfig
from kubetune_trainer.config.finetune import FineTuneConfig
from kubetune_trainer.config.quantize import QuantizeConfig
from kubetune_trainer.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 2e-4 is a number (YAML 1.2), not the string that YAML 1.1 makes of it."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


Config = TypeVar("Config", bound=JobConfig)

KINDS: Final[dict[str, type[JobConfig]]] = {
    "FineTuneJob": FineTuneConfig,
    "EvalJob": EvalConfig,
    "QuantizeJob": QuantizeConfig,
}
"""Each kind's config."""


@overload
def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> FineTuneConfig: ...
@overload
def load_config(path: str | Path, *, expect: type[Config], overrides: Sequence[str] = ()) -> Config: ...
def load_config(
    path: str | Path, *, expect: type[JobConfig] = FineTuneConfig, overrides: Sequence[str] = ()
) -> JobConfig:
    """Reads, completes and checks a config file.

    Args:
        path: The YAML file.
        expect: The config of the kind that the caller runs; `JobConfig` takes every kind and goes by the file's word.
        overrides: `a.b=c` each, the value in YAML, as in training.max_steps=10 or dataset.sources.0.weight=2.

    Raises:
        ConfigError: The file cannot be read, or a field breaks a rule; every broken rule is named.
    """
    path = Path(path)
    values = _read(path)
    for override in overrides:
        _apply_override(values, override)
    _fill_in_run(values, path)
    kind = values.setdefault("kind", next((kind for kind, config in KINDS.items() if config is expect), "FineTuneJob"))
    if expect is JobConfig:
        if kind not in KINDS:
            raise ConfigError(f"config {path}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        expect = KINDS[kind]
    try:
        return expect.model_validate(values)
    except ValidationError as error:
        raise _config_error(expect, values["run"], error.errors()) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config {path} must be a mapping, got {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form field=value, as in training.max_steps=10")
    *parents, last = key.split(".")
    at: Any = values
    try:
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else _descend(at, name)
        at[int(last) if isinstance(at, list) else last] = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"override {override!r}: {key} does not lead to a field ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _descend(values: dict[str, Any], name: str) -> Any:
    if values.get(name) is None:
        values[name] = {}
    return values[name]


def _fill_in_run(values: dict[str, Any], path: Path) -> None:
    """Completes a config that a person wrote: names, folders, and ranks as torchrun tells them."""
    run = values.setdefault("run", {})
    workspace = values.setdefault("workspace", {"uri": f"file://{Path.cwd()}/runs"})
    if not isinstance(run, dict) or not isinstance(workspace, dict):
        return  # refused by the models, with the field's name
    root = str(workspace.get("uri", "")).rstrip("/")
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    run.setdefault("name", path.stem)
    run.setdefault("directory", f"{root}/{run['name']}")
    run.setdefault("cache", f"{root}/cache")
    run.setdefault("num_nodes", max(1, world // local))
    run.setdefault("processes_per_node", local)


def _config_error(config: type[JobConfig], run: Any, errors: Sequence[ErrorDetails]) -> ConfigError:
    named = run if isinstance(run, dict) else {}
    kind = next(kind for kind, each in KINDS.items() if each is config)
    title = f"{kind} {named.get('namespace', 'local')}/{named.get('name', '')}"
    # A list with a wrong item is also reported as too short; only the item is the person's mistake.
    told = [e for e in errors if not any(o["loc"][: len(e["loc"])] == e["loc"] and o is not e for o in errors)]
    problems = [_describe(config, error) for error in told or errors]
    return ConfigError(f"{title}: " + "; ".join(problems), hint="Correct the named fields of the config.")


def _describe(config: type[JobConfig], error: ErrorDetails) -> str:
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        return f"{field} is not a field{_did_you_mean(config, error['loc'])}"
    if error["type"] == "missing":
        return f"{field} is required"
    if error["type"] == "value_error":
        return f"{field} {error['ctx']['error']}".strip()
    return f"{field} {error['msg'].replace('Input should', 'must')}, got {error['input']!r}"


def _did_you_mean(config: type[JobConfig], location: tuple[int | str, ...]) -> str:
    """The nearest field of the same block, as a question; empty when none is near."""
    block: Any = config
    for part in location[:-1]:
        if isinstance(part, str) and hasattr(block, "model_fields"):
            block = _block_of(block.model_fields[part].annotation)
    known = list(getattr(block, "model_fields", ()))
    snake = re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", str(location[-1])).lower()
    near = difflib.get_close_matches(snake, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _block_of(annotation: Any) -> Any:
    """The model class inside an annotation like Lora | None or tuple[Source, ...] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _block_of(inner)
        if found is not None:
            return found
    return None
