"""What the API's models are made of: a base class, and rules that pydantic and the API server both check.

A field's schema says what one value may be; a `Rule` says what a schema cannot (exactly one of, needs, immutable).
Each rule is one CEL expression for the API server and one Python check for the command line and the operator, under
one message.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

RULES_BROKEN = "rules_broken"
"""The error type that a broken rule raises in pydantic; its context holds the rules."""
DUPLICATE = "duplicate"
"""The error type of an item that stands twice in a list; its context holds its place and what it has in common."""

BRANCHES = ("<integer>", "<string>")
"""How pydantic names the branches of `IntOrString` in the place of an error."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One sentence that a value must keep.

    Attributes:
        cel: The expression that the API server evaluates; `self` is the value.
        message: What the user reads, from either side.
        check: The same in Python. None for rules on the object's former version, which only the API server has.
        keyed: The rule stands on the values of a map, whose fields the API server then writes as `limits[cpu]`.
    """

    cel: str
    message: str
    check: Callable[[Any], bool] | None = None
    keyed: bool = False

    def to_crd(self) -> dict[str, str]:
        """The rule as an item of `x-kubernetes-validations`."""
        return {"rule": self.cel, "message": self.message}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the annotated value after its own schema."""

        def validate(value: Any) -> Any:
            check_rules(value, rules=(self,))
            return value

        return core_schema.no_info_after_validator_function(validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Put the rule beside the annotated value's own schema."""
        json_schema = handler(schema)
        json_schema.setdefault("x-kubernetes-validations", []).append(self.to_crd())
        return json_schema


@dataclass(frozen=True)
class IntOrString:
    """An integer or a string, as quantities of resources are written."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Name the branches so that no key of a manifest can be taken for one."""
        integer, string = BRANCHES
        return core_schema.union_schema(
            [(core_schema.int_schema(strict=True), integer), (core_schema.str_schema(strict=True), string)]
        )


@dataclass(frozen=True)
class Unique:
    """What no two items of a list may have in common.

    Attributes:
        keys: Fields of the items, as in a manifest; none: the items themselves.
    """

    keys: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the annotated list after its own schema."""
        return core_schema.no_info_after_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Put the list's markers beside its own schema."""
        markers: dict[str, Any] = {"x-kubernetes-list-type": "map" if self.keys else "set"}
        if self.keys:
            markers["x-kubernetes-list-map-keys"] = list(self.keys)
        return handler(schema) | markers

    def _validate(self, items: list[Any]) -> list[Any]:
        seen: list[Any] = []
        for index, item in enumerate(items):
            identity = {key: _get(item, key) for key in self.keys} if self.keys else item
            if identity in seen:
                shown = json.dumps(identity, separators=(",", ":"))
                raise PydanticCustomError(DUPLICATE, "duplicate {shown}", {"index": index, "shown": shown})
            seen.append(identity)
        return items


def check_rules(value: Any, *, rules: tuple[Rule, ...]) -> None:
    """Raise one error that names every rule which the value breaks."""
    if broken := [rule for rule in rules if rule.check is not None and not rule.check(value)]:
        messages = "; ".join(rule.message for rule in broken)
        raise PydanticCustomError(RULES_BROKEN, "{messages}", {"messages": messages, "broken": broken})


class ApiModel(BaseModel):
    """Base of every object: camelCase in manifests, snake_case in Python, frozen, no unknown fields, no conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """A null is an absent field, as it is for the API server; an unknown field stays and is refused."""
        if not isinstance(data, dict):
            return data
        known = {field.alias for field in cls.model_fields.values()}
        return {key: value for key, value in data.items() if value is not None or key not in known}

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        check_rules(self, rules=self.rules)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Put the class's rules beside its schema."""
        json_schema = handler(schema)
        if cls.rules:
            handler.resolve_ref_schema(json_schema)["x-kubernetes-validations"] = [rule.to_crd() for rule in cls.rules]
        return json_schema

    def to_manifest(self) -> dict[str, Any]:
        """The object as it stands in a manifest: camelCase, without absent fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(ApiModel):
    """Base of what the operator writes: a field that another version of the operator wrote is passed over."""

    model_config = ConfigDict(extra="ignore")


def exactly_one_of(*names: str) -> Rule:
    """The rule that one, and only one, of these fields is set."""
    return Rule(
        cel="[" + ", ".join(f"has(self.{name})" for name in names) + "].exists_one(x, x)",
        message=f"exactly one of {', '.join(names)} must be set",
        check=lambda value: sum(_has(value, name) for name in names) == 1,
    )


def _has(value: ApiModel, name: str) -> bool:
    return _get(value, name) is not None


def _get(value: ApiModel, name: str) -> Any:
    """The field that is called `name` in a manifest."""
    return next(getattr(value, key) for key, field in type(value).model_fields.items() if field.alias == name)
