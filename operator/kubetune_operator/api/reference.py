"""The reference page of a kind, written from its CRD: what `kubectl explain` says, on one page."""

from collections.abc import Iterator
from typing import Any


def reference_of(crd: dict[str, Any]) -> str:
    """The page as Markdown: one table per object of spec and status, the rules below each."""
    version = crd["spec"]["versions"][0]
    names = crd["spec"]["names"]
    schema = version["schema"]["openAPIV3Schema"]
    lines = [
        f"# {names['kind']}",
        "",
        "<!-- Generated from the models in kubetune_operator.api by `make generate`. Do not edit. -->",
        "",
        f"`{crd['spec']['group']}/{version['name']}`, short name `{names['shortNames'][0]}`.",
        "",
        schema["description"],
        "",
        *_rules(schema),
    ]
    for name in ("spec", "status"):
        for path, each in _objects(name, schema["properties"][name]):
            lines += [f"## {path}", "", each.get("description", ""), "", *_table(each, path=path), *_rules(each)]
    return "\n".join(lines).rstrip() + "\n"


def _objects(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object itself and each object below it, in the order of the fields."""
    yield path, schema
    for name, field in schema["properties"].items():
        inner, suffix = (field["items"], "[]") if field.get("type") == "array" else (field, "")
        if "properties" in inner:
            yield from _objects(f"{path}.{name}{suffix}", inner)


def _table(schema: dict[str, Any], *, path: str) -> list[str]:
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = (
            "required" if name in schema.get("required", []) else _code(field["default"]) if "default" in field else ""
        )
        rows.append(
            f"| `{name}` | {_linked(field, path=f'{path}.{name}')} | {default} | {_meaning(field)} |".replace("  ", " ")
        )
    return [*rows, ""]


def _linked(field: dict[str, Any], *, path: str) -> str:
    """A field's type; that of an object leads to its table."""
    inner = field["items"] if field.get("type") == "array" else field
    return f"[{_kind(field)}](#{path.replace('.', '').lower()})" if "properties" in inner else _kind(field)


def _meaning(field: dict[str, Any]) -> str:
    """A field's description and, where it has no table of its own, its rules."""
    rules = [] if "properties" in field else field.get("x-kubernetes-validations", [])
    return " ".join([field.get("description", ""), *(f"It {rule['message']}." for rule in rules)])


def _kind(field: dict[str, Any]) -> str:
    """A field's type with its limits, for example `integer 1-4096`."""
    if "enum" in field:
        return ", ".join(_code(value) for value in field["enum"])
    if "x-kubernetes-int-or-string" in field:
        return "quantity"
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    if "additionalProperties" in field:
        return f"map of {_kind(field['additionalProperties'])}"
    if field["type"] == "integer" and "maximum" in field:
        return f"integer {field.get('minimum', 0)}–{field['maximum']}"  # noqa: RUF001 (a range)
    return str(field.get("format", field["type"]))


def _rules(schema: dict[str, Any]) -> list[str]:
    messages = dict.fromkeys(rule["message"] for rule in schema.get("x-kubernetes-validations", []))
    return [*(f"- {message}" for message in messages), ""] if messages else []


def _code(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if value == "" else str(value)
    return f"`{text}`".replace("'", "")
