"""Dataclasses to plain data and back: what is equal afterwards, and which message names what does not fit."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg._serde import from_plain, read_yaml, to_json, to_plain, to_yaml
from repvgg.errors import UsageError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    size: tuple[int, int] = (1, 2)
    parts: tuple[Inner, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    limit: int | str = 0
    notes: dict[str, Any] = field(default_factory=dict)
    on: bool = False


INNERS = st.builds(Inner, rate=st.floats(allow_nan=False), kind=st.sampled_from(["a", "b", None]))
OUTERS = st.builds(
    Outer,
    name=st.text(),
    size=st.tuples(st.integers(), st.integers()),
    parts=st.lists(INNERS, max_size=3).map(tuple),
    counts=st.dictionaries(st.text(), st.integers(), max_size=3),
    limit=st.integers() | st.text(),
    notes=st.dictionaries(st.text(), st.none() | st.booleans() | st.text(), max_size=3),
    on=st.booleans(),
)


@given(OUTERS)
def test_json_round_trip(value):
    assert from_plain(Outer, json.loads(to_json(value)), "file") == value


@given(OUTERS)
def test_yaml_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "value.yaml"
    path.write_text(to_yaml(value), encoding="utf-8")
    assert read_yaml(Outer, path) == value


def test_nan_survives_json():
    assert math.isnan(from_plain(Inner, json.loads(to_json(Inner(math.nan))), "file").rate)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"^file has to be a mapping of fields, not \[\]\.$"),
        ({}, r"^file lacks name\.$"),
        ({"name": "x", "nmae": "y"}, r"^file has no field 'nmae': there are counts, limit, name, .*\.$"),
        ({"name": 1}, r"^file: name has to be of type str, not 1\.$"),
        ({"name": "x", "size": [1]}, r"^file: size has to be a list of 2, not \[1\]\.$"),
        ({"name": "x", "size": [1, True]}, r"^file: size\[1\] has to be of type int, not True\.$"),
        ({"name": "x", "parts": [{"kind": "c"}]}, r"^file: parts\[0\]: kind has to be one of 'a', 'b', not 'c'\.$"),
        ({"name": "x", "counts": {"k": 1.5}}, r"^file: counts: k has to be of type int, not 1\.5\.$"),
        ({"name": "x", "limit": 1.5}, r"^file: limit has to be of type int or str, not 1\.5\.$"),
        ({"name": "x", "on": 1}, r"^file: on has to be of type bool, not 1\.$"),
        ({"name": "x", "parts": "ab"}, r"^file: parts has to be a list, not 'ab'\.$"),
    ],
)
def test_mismatch_names_the_place(data, message):
    with pytest.raises(UsageError, match=message):
        from_plain(Outer, data, "file")


def test_fields_of_a_later_version_can_be_ignored():
    data = {"name": "x", "new": 1, "parts": [{"rate": 1, "newer": 2}]}
    value = from_plain(Outer, data, "file", unknown="ignore")
    assert value == Outer("x", parts=(Inner(1.0),))
    assert type(value.parts[0].rate) is float


def test_to_plain_leaves_no_tuples_or_dataclasses():
    assert to_plain(Outer("x", parts=(Inner(),))) == {
        "name": "x",
        "size": [1, 2],
        "parts": [{"rate": 0.1, "kind": None}],
        "counts": {},
        "limit": 0,
        "notes": {},
        "on": False,
    }


def test_unreadable_and_malformed_files(tmp_path):
    with pytest.raises(UsageError, match=r"^The config '.*none\.yaml' cannot be read: No such file or directory\.$"):
        read_yaml(Outer, tmp_path / "none.yaml", what="config")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(UsageError, match=r"^The config '.*bad\.yaml' is not YAML: "):
        read_yaml(Outer, tmp_path / "bad.yaml", what="config")
