"""JSON of the domain's dataclasses as it is kept, for readers that are one version older or newer than its writer.

A field at its default is not written: what nobody asked for is no concern of a reader that does not know it. What a
reader does not know it leaves out and names, and its caller decides whether that matters (ADR 12). Public requests do
not come through here: they are refused for what is not known.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

_ALWAYS = frozenset(
    {
        *("method", "lora", "hyperparameters", "over_length_policy", "learning_rates", "ranks"),
        *("metrics", "grader", "differences", "confusion"),
        *("over_length", "unusable", "leaked", "estimate", "notes", "first_rows"),
    }
)
"""Written at their default too: the Graft before this rule cannot read without them. May go with the next version."""


class _NotKnown(ValueError):
    """A value that an enumeration of this version does not have."""


def to_json(value: Any) -> Any:
    """JSON of a dataclass, or of what one holds."""
    if is_dataclass(value) and not isinstance(value, type):
        told = {field: getattr(value, field.name) for field in fields(value)}
        return {
            field.name: to_json(found)
            for field, found in told.items()
            if field.name in _ALWAYS or found != _default(field)
        }
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, dict):
        return {name: to_json(one) for name, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, list | tuple) else value


def from_json(kind: type[T], value: Mapping[str, Any], unknown: list[str] | None = None) -> T:
    """The dataclass of `to_json`. Paths of what `kind` does not know are added to `unknown`: fields, and values of an
    enumeration, whose field is then at its default.

    Raises TypeError for a field that is missing and has no default.
    """
    made: T = _read(kind, value, "", [] if unknown is None else unknown)
    return made


def _read(kind: Any, value: Any, path: str, unknown: list[str]) -> Any:
    if value is None:
        return None
    if is_dataclass(kind):
        return _read_fields(kind, value, path, unknown)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if value not in set(kind):
            raise _NotKnown(value)
        return kind(value)
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_read(of[0], one, path, unknown) for one in value)
    if origin is dict:
        return {name: _read(of[1], one, f"{path}.{name}", unknown) for name, one in value.items()}
    if origin in (types.UnionType, typing.Union):
        kinds = [one for one in of if one is not type(None)]
        return _read(kinds[0], value, path, unknown) if len(kinds) == 1 else value
    return value


def _read_fields(kind: Any, value: Mapping[str, Any], path: str, unknown: list[str]) -> Any:
    kinds, known = _kinds(kind), {}
    for name, one in value.items():
        at = f"{path}.{name}" if path else name
        if name not in kinds:
            unknown.append(at)
            continue
        try:
            known[name] = _read(kinds[name], one, at, unknown)
        except _NotKnown as error:
            unknown.append(f"{at}: {error}")
    return kind(**known)


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default  # MISSING, which equals nothing, where there is none
