"""Metadata and conditions on it: which values there are, and `where` as SQL. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MetadataValue = str | int | float | bool
# key -> a value to be equal to, or {"gte": 2020, "lt": 2024}, {"in": [...]}, {"exists": True}
Where = Mapping[str, MetadataValue | Mapping[str, Any]]

MAX_VALUES = 30_000  # in one `where`; SQLite takes 32,766 parameters

_BOUNDS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_KINDS: dict[str, type | tuple[type, ...]] = {"text": str, "number": (int, float), "bool": int}
_ALLOWED = (
    'a value, {"in": [values]}, {"exists": True or False}, or bounds: {"gte": 2020, "lt": 2024} '
    "(gt, gte, lt, lte)"
)


def encode_metadata(
    metadata: Mapping[str, MetadataValue] | None,
) -> dict[str, tuple[str, str | int | float]]:
    """Metadata as it is stored and compared: key -> (kind, value), kind "text", "number" or "bool".

    Values are text, finite numbers, or True and False; whole numbers have at most 64 bits. 1 and
    1.0 are equal, 1, "1" and True are not. Raises ValueError for anything else.
    """
    return {_checked_key(key): _encoded(key, value) for key, value in (metadata or {}).items()}


def decode_metadata(kind: str, value: object) -> MetadataValue:
    """What `encode_metadata` was given; ValueError if the two do not go together."""
    if not isinstance(value, _KINDS.get(kind, ())):
        raise ValueError(f"metadata {value!r} is no {kind}")
    return bool(value) if kind == "bool" else value  # type: ignore[return-value]


def where_sql(where: Where | None) -> tuple[str, list[Any]]:
    """Conditions on metadata -> SQL about a column `video_id`, and its parameters.

    where: key -> a value to be equal to, in kind too; `{"in": [...]}`: one of them; `{"gt": a}`,
    "gte", "lt", "lte", alone or together: values of that kind, numbers or text by code points,
    within these bounds; `{"exists": True}`: any value, False: none. Several keys: all of them must
    hold, and it is quickest if the one that leaves the fewest videos stands first; none: always
    true. Raises ValueError that names the key and what is allowed.
    """
    if where is not None and not isinstance(where, Mapping):
        raise ValueError(f"where is of keys and what their values must be like, got {where!r}")
    held: list[str] = []
    lacking: list[str] = []
    values: list[Any] = []
    for key, condition in (where or {}).items():
        sql, of_key = key_sql(key, condition)
        if condition == {"exists": False}:
            lacking.append(key)
        else:
            held.append(sql)
            values += of_key
    parameters = [*values, *lacking]
    if len(parameters) > MAX_VALUES:
        raise ValueError(f"where has {len(parameters)} values, {MAX_VALUES} are the most")
    parts = ["video_id NOT IN (SELECT video_id FROM metadata WHERE key = ?)"] * len(lacking)
    if held:
        # the first one finds videos, of which the others are looked up one by one
        looked_up = [
            f"AND EXISTS (SELECT 1 FROM metadata WHERE video_id = found.video_id AND {sql})"
            for sql in held[1:]
        ]
        found = " ".join([f"SELECT video_id FROM metadata AS found WHERE {held[0]}", *looked_up])
        parts.insert(0, f"video_id IN ({found})")
    return " AND ".join(parts) or "TRUE", parameters


def key_sql(key: str, condition: object) -> tuple[str, list[Any]]:
    """A condition of a `where` -> SQL about a row of `metadata`, and its parameters.

    `{"exists": False}` is SQL about the rows that there should not be. Raises as `where_sql`.
    """
    sql, parameters = _value_sql(_checked_key(key), condition)
    return f"key = ? AND {sql}", [key, *parameters]


def _value_sql(key: str, condition: object) -> tuple[str, list[Any]]:
    if not isinstance(condition, Mapping):
        if isinstance(condition, Sequence) and not isinstance(condition, str):
            raise ValueError(f'where {key!r}: for one of several values write {{"in": [...]}}')
        return "kind = ? AND value = ?", list(_encoded(key, condition))
    wrong = set(condition) - {*_BOUNDS, "in", "exists"}
    if wrong or not condition:
        what = f"does not know {sorted(map(str, wrong))}" if wrong else "says nothing"
        raise ValueError(f"where {key!r} {what}; it takes {_ALLOWED}")
    if "exists" in condition:
        if len(condition) > 1 or not isinstance(condition["exists"], bool):
            raise ValueError(f"where {key!r}: exists is True or False, and stands alone")
        return "TRUE", []
    parts, parameters = [], []
    if "in" in condition:
        sql, values = _one_of(key, condition["in"])
        parts.append(sql)
        parameters += values
    bounds = {name: _encoded(key, condition[name]) for name in _BOUNDS if name in condition}
    kinds = {kind for kind, _ in bounds.values()}
    if "bool" in kinds or len(kinds) > 1:
        raise ValueError(f"where {key!r}: bounds are numbers, or all of them text; got {condition}")
    if bounds:
        parts.append("kind = ?")
        parameters += kinds
    for name, (_, value) in bounds.items():
        parts.append(f"value {_BOUNDS[name]} ?")
        parameters.append(value)
    return " AND ".join(parts), parameters


def _one_of(key: str, values: object) -> tuple[str, list[Any]]:
    if not isinstance(values, Sequence | set | frozenset) or isinstance(values, str):
        raise ValueError(f"where {key!r}: in takes a list of values, got {values!r}")
    of_kind: dict[str, list[Any]] = {}
    for kind, value in (_encoded(key, value) for value in values):
        of_kind.setdefault(kind, []).append(value)
    parts = [f"kind = ? AND value IN ({', '.join('?' * len(of_kind[kind]))})" for kind in of_kind]
    parameters = [part for kind, encoded in of_kind.items() for part in (kind, *encoded)]
    return f"({' OR '.join(parts) or 'FALSE'})", parameters


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not key or not _is_unicode(key):
        raise ValueError(f"a metadata key must be text and not empty, got {key!r}")
    return key


def _encoded(key: str, value: object) -> tuple[str, str | int | float]:
    if isinstance(value, bool):
        return "bool", int(value)
    if isinstance(value, str) and _is_unicode(value):
        return "text", str(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "number", int(value)
    if isinstance(value, float) and math.isfinite(value):
        return "number", float(value)
    raise ValueError(
        f"metadata {key!r} must be text, a finite number (whole ones of 64 bits at most), or True "
        f"or False; got {value!r}"
    )


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
