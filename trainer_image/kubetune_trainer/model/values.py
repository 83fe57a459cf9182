"""Values of a parsed `config.json`, read strictly: what is not what its key needs is refused by key and value.

A key that is absent or null takes the default; where there is none it is refused as well.
"""

import sys
from collections.abc import Mapping
from typing import Any

from kubetune_trainer.errors import DataError
from kubetune_trainer.model_json import CONFIG_FILE

Config = Mapping[str, Any]


def whole_number(config: Config, key: str, *, default: int | None = None, least: int = 1, within: str = "") -> int:
    """Return an integer that counts or measures something.

    Args:
        config: The object that has the key.
        key: Its name.
        default: What an absent key stands for.
        least: The smallest that makes sense.
        within: How messages call where the key is.

    Raises:
        DataError: The key is missing, or is no such integer.
    """
    value = _found(config, key, default=default, within=within)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= sys.maxsize:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise DataError(f"{CONFIG_FILE}: {within}{key} must be {wanted}, got {value!r}")
    return value


def positive_number(config: Config, key: str, *, default: float | None = None, within: str = "") -> float:
    """Return a finite number above 0; arguments and errors are those of `whole_number`."""
    value = _found(config, key, default=default, within=within)
    if not is_positive(value):
        raise DataError(f"{CONFIG_FILE}: {within}{key} must be a positive number, got {value!r}")
    return float(value)


def flag(config: Config, key: str, *, within: str = "") -> bool:
    """Return true or false; a key that is absent or null is false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{CONFIG_FILE}: {within}{key} must be true or false, got {value!r}")
    return bool(value)


def mapping(config: Config, key: str, *, within: str = "") -> Config:
    """Return an object; a key that is absent or null is an empty one."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{CONFIG_FILE}: {within}{key} must be an object, got {value!r}")
    return value or {}


def is_positive(value: object) -> bool:
    """Whether something is a number above 0 that a float holds; NaN and infinity are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _found(config: Config, key: str, *, default: Any, within: str) -> Any:
    if key not in config and default is None:
        raise DataError(f"{CONFIG_FILE}: {within}{key} is missing")
    value = config.get(key)
    return default if value is None else value
