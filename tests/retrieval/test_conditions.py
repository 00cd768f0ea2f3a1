"""`where`: the same videos as comparisons in Python find, and errors that say what is allowed."""

import operator
import sqlite3
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.conditions import (
    MAX_VALUES,
    MetadataValue,
    decode_metadata,
    encode_metadata,
    where_sql,
)

NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 1, 1.0, -0.0, 2**53, 2**53 + 1, float(2**53), 2020, 2020.5]),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=3) | st.sampled_from(
    ["1", "north", "north ", "Ä", "x' OR 1=1 --", '"; DROP TABLE metadata; --', "\0", "😀"]
)
VALUES = NUMBERS | TEXTS | st.booleans()
KEYS = st.sampled_from(["a", "b", "key ' with \" quotes; --"])
BOUNDS = st.one_of(
    *(
        st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), of_kind, min_size=1)
        for of_kind in (NUMBERS, TEXTS)
    )
)
CONDITIONS = st.one_of(
    VALUES,
    BOUNDS,
    st.builds(
        lambda values, bounds: {"in": values, **bounds}, st.lists(VALUES), BOUNDS | st.just({})
    ),
    st.builds(lambda is_there: {"exists": is_there}, st.booleans()),
)


def _kind(value: MetadataValue) -> str:
    return {bool: "bool", str: "text"}.get(type(value), "number")


def _is_equal(a: MetadataValue, b: MetadataValue) -> bool:
    return _kind(a) == _kind(b) and a == b


def _holds(condition: Any, held: Mapping[str, MetadataValue], key: str) -> bool:
    """What `where_sql` promises, in plain Python."""
    if condition == {"exists": False}:
        return key not in held
    if key not in held:
        return False
    if not isinstance(condition, Mapping):
        return _is_equal(held[key], condition)
    for name, wanted in condition.items():
        if name == "in":
            if not any(_is_equal(held[key], value) for value in wanted):
                return False
        elif name != "exists":
            compare = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
            if _kind(held[key]) != _kind(wanted) or not compare[name](held[key], wanted):
                return False
    return True


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.dictionaries(KEYS, VALUES), max_size=6),
    st.dictionaries(KEYS, CONDITIONS, max_size=3),
)
def test_where_finds_what_python_finds(
    rows: list[dict[str, MetadataValue]], where: dict[str, Any]
) -> None:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE metadata (video_id, key TEXT, kind TEXT, value)")
    database.execute("CREATE TABLE videos (video_id)")
    for video_id, row in enumerate(rows):
        database.execute("INSERT INTO videos VALUES (?)", [video_id])
        encoded = [(video_id, key, *value) for key, value in encode_metadata(row).items()]
        database.executemany("INSERT INTO metadata VALUES (?, ?, ?, ?)", encoded)
    condition, parameters = where_sql(where)
    found = database.execute(
        f"SELECT video_id FROM videos WHERE {condition} ORDER BY video_id", parameters
    ).fetchall()
    expected = [
        video_id
        for video_id, row in enumerate(rows)
        if all(_holds(condition, row, key) for key, condition in where.items())
    ]
    assert [video_id for (video_id,) in found] == expected
    database.close()


@given(VALUES)
def test_a_value_comes_back_as_it_was(value: MetadataValue) -> None:
    [(kind, encoded)] = encode_metadata({"a": value}).values()
    again = decode_metadata(kind, encoded)
    assert again == value and type(again) is type(value)


def test_parameters_are_bound_never_in_the_text() -> None:
    hostile = "x' OR 1=1; DROP TABLE videos; --"
    for where in ({hostile: hostile}, {hostile: {"in": [hostile]}}, {hostile: {"gt": hostile}}):
        sql, parameters = where_sql(where)
        assert "DROP" not in sql and parameters.count(hostile) == 2


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"a": {"greater": 1}}, r"where 'a' does not know \['greater'\]; it takes a value, "),
        ({"a": {}}, "where 'a' says nothing; it takes a value"),
        ({"a": [1, 2]}, r"where 'a': for one of several values write \{\"in\": \[...\]\}"),
        ({"a": {"in": "abc"}}, "where 'a': in takes a list of values, got 'abc'"),
        ({"a": {"in": [None]}}, "metadata 'a' must be text, a finite number"),
        ({"a": {"exists": 1}}, "where 'a': exists is True or False, and stands alone"),
        ({"a": {"exists": True, "gt": 1}}, "exists is True or False, and stands alone"),
        ({"a": {"gte": 1, "lt": "b"}}, "where 'a': bounds are numbers, or all of them text"),
        ({"a": {"gte": True}}, "where 'a': bounds are numbers, or all of them text"),
        ({"a": {"gte": float("nan")}}, "metadata 'a' must be text, a finite number"),
        ({"a": None}, "metadata 'a' must be text, a finite number"),
        ({"": 1}, "a metadata key must be text and not empty, got ''"),
        ({"a": {"in": list(range(MAX_VALUES + 1))}}, "where has 30003 values, 30000 are the most"),
    ],
)
def test_what_is_no_condition_is_said(where: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        where_sql(where)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata",
    [{"a": None}, {"a": [1]}, {"a": float("nan")}, {"": 1}, {"a": 2**63}, {"a": "\ud800"},
     {"\ud800": 1}],
)  # fmt: skip
def test_metadata_that_cannot_be_compared_are_refused(metadata: dict) -> None:
    with pytest.raises(ValueError, match="metadata"):
        encode_metadata(metadata)


@pytest.mark.parametrize(("kind", "value"), [("text", 1), ("number", "1"), ("bool", "x"), ("?", 1)])
def test_a_kind_that_does_not_fit_its_value_is_damage(kind: str, value: object) -> None:
    with pytest.raises(ValueError, match="is no"):
        decode_metadata(kind, value)
