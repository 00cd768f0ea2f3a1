"""Settings from a file, checked against typed classes: one clear line for each mistake.

A settings class is a frozen pydantic dataclass made with `@settings`: unknown keys are refused.
"""

import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass

T = TypeVar("T")

_made: set[str] = set()  # names of the settings classes


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class of annotated fields a frozen dataclass that checks types and unknown keys."""
    made: Any = dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))(cls)
    checked = made.__init__

    def __init__(self: Any, *arguments: Any, **values: Any) -> None:
        try:
            checked(self, *arguments, **values)
        except pydantic.ValidationError as error:
            raise ValueError(_explain(made, error, made.__name__)) from None

    made.__init__ = __init__
    _made.add(made.__name__)
    return made


def parse(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Make `cls` from nested plain values.

    Raises ValueError with one line per mistake: the source, the key, what was got and what is
    wanted; for an unknown key also the nearest real one.
    """
    # through JSON, whose strict mode takes a list for a tuple, but no text for a number
    text = json.dumps(values, default=str)
    try:
        return pydantic.TypeAdapter(cls).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(cls, error, source)) from None


def _explain(cls: type, error: pydantic.ValidationError, source: str) -> str:
    """One line per mistake."""
    lines = dict.fromkeys(_line(cls, details) for details in error.errors())
    return "\n".join(f"{source}: {line}" for line in lines)


def _line(cls: type, details: Any) -> str:
    path = [str(part) for part in details["loc"]]
    key = ".".join(path)
    if details["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys(cls, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else ""
        return f"unknown key {key!r}; " + (hint or f"known here: {', '.join(sorted(known))}")
    if details["type"] in ("missing", "missing_argument"):
        return f"missing key {key!r}"
    message = details["msg"].removeprefix("Value error, ")
    made, _, rest = message.partition(": ")  # one settings class may make another
    message = rest if made in _made else message
    message = message[0].lower() + message[1:]
    # a class that checks itself names its own values; a wrong type does not
    got = "" if details["type"] == "value_error" else f", got {details['input']!r}"
    return f"{key}: {message}{got}" if key else f"{message}{got}"


def _keys(cls: Any, path: list[str]) -> list[str]:
    """Field names of the class that `path` leads to from `cls`."""
    for part in path:
        if is_dataclass(cls) and not part.isdecimal():  # a number is a place in a list
            cls = _inner(typing.get_type_hints(cls).get(part))
    return [field.name for field in fields(cls)] if is_dataclass(cls) else []


def _inner(annotation: Any) -> Any:
    """The dataclass inside `list[X]`, `tuple[X, ...]` or `X | None`; else the annotation itself."""
    origin = typing.get_origin(annotation)
    if origin in (list, tuple, typing.Union, types.UnionType):
        inner = [_inner(argument) for argument in typing.get_args(annotation)]
        return next((cls for cls in inner if is_dataclass(cls)), annotation)
    return annotation
