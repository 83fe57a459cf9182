"""Manifests in YAML, read and written as kubectl does.

kubectl's YAML is neither version 1.1 nor 1.2: `2e-4` is a float there and a string for PyYAML, `1:30` is a string there
and a number for PyYAML, dates stay strings. A file must mean the same to `kubetune validate` and to `kubectl apply`.
"""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from kubetune_operator.errors import SpecError

_BOOL = {"y", "yes", "on", "true"}, {"n", "no", "off", "false"}
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"y|Y|n|N|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|true|True|TRUE|false|False|FALSE", list("yYnNoOtTfF")),
    ("int", r"[-+]?(0[bB][01_]+|0[oO]?[0-7_]+|0[xX][0-9a-fA-F_]+|[1-9][0-9_]*|0)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as kubectl's YAML library (go-yaml 2) does.

    It refuses a key that stands twice, of which kubectl takes the last without a word.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping with keys as JSON has them."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is no text; is this a template that was not rendered?", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{key_node.value}" stands twice', key_node.start_mark
                )
            seen.add(key_node.value)
        return {_json_key(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


class _Dumper(yaml.SafeDumper):
    """Quotes what kubectl or PyYAML would not read back as a string; indents lists; writes no aliases."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012 (PyYAML's own attribute)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 (PyYAML's signature)
        super().increase_indent(flow=flow, indentless=False)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
        return True


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def load_manifests(text: str, *, source: str) -> list[dict[str, Any]]:
    """Read every object of a YAML or JSON text.

    Args:
        text: One or more documents; empty ones are passed over.
        source: The file's name, for messages.

    Raises:
        SpecError: The text is no YAML, or a document is no object.
    """
    try:
        documents = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except yaml.YAMLError as error:
        raise SpecError(source, problems=[" ".join(str(error).split())]) from error
    except RecursionError as error:
        raise SpecError(source, problems=["is nested too deep"]) from error
    for number, document in enumerate(documents, start=1):
        if not isinstance(document, dict):
            raise SpecError(source, problems=[f"document {number} is no object with apiVersion and kind"])
    return documents


def dump_manifests(manifests: list[dict[str, Any]]) -> str:
    """Write objects as one YAML text, a document each."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=116, allow_unicode=True)


def _construct_bool(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    return str(loader.construct_scalar(node)).lower() in _BOOL[0]


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if digits.startswith(("0x", "0b", "0o")):
        return sign * int(digits, 0)
    if len(digits) > 1 and digits.startswith("0"):
        return sign * int(digits, 8)
    number = sign * int(digits)
    return number if -(2**63) <= number < 2**63 else float(number)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int | str:
    """A float; the integer that JSON makes of one without a fraction; the text if it is too large for a float."""
    text = str(loader.construct_scalar(node)).replace("_", "").lower()
    if text.endswith(("inf", "nan")):
        raise yaml.constructor.ConstructorError(None, None, f"JSON has no number {node.value}", node.start_mark)
    number = float(text)
    if math.isinf(number):
        return str(node.value)
    return int(number) if number.is_integer() and abs(number) < 1e21 else number


def _json_key(key: Hashable) -> str:
    if key is None:
        raise yaml.constructor.ConstructorError(None, None, "a key is empty", None)
    if isinstance(key, bool):
        return str(key).lower()
    return key if isinstance(key, str) else str(key)


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text of several lines as people write it, a block."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_string)
_Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
