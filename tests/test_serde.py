"""Dataclasses to plain data and back: what is equal afterwards, and which message names what does not fit."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg._serde import check_finite, from_plain, read_yaml, to_json, to_plain, to_yaml
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


INT64 = st.integers(-(2**63), 2**63 - 1)
INNERS = st.builds(Inner, rate=st.floats(allow_nan=False), kind=st.sampled_from(["a", "b", None]))
OUTERS = st.builds(
    Outer,
    name=st.text(),
    size=st.tuples(INT64, INT64),
    parts=st.lists(INNERS, max_size=3).map(tuple),
    counts=st.dictionaries(st.text(), INT64, max_size=3),
    limit=INT64 | st.text(),
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


def bomb(levels):
    """Ten items, ten times, on each level: ten billion in 500 bytes."""
    names = [chr(98 + level) for level in range(levels)]
    lines = [f"&{name} [{','.join(['*' + chr(ord(name) - 1)] * 10)}]" for name in names]
    return f"[&a [x,x,x,x,x,x,x,x,x,x], {', '.join(lines)}]"


def merge_bomb(levels):
    lines = [f"a: &a {{{', '.join(f'k{i}: 1' for i in range(10))}}}"]
    for level in range(levels):
        name = chr(98 + level)
        lines.append(f"{name}: &{name} {{<<: [{', '.join(['*' + chr(97 + level)] * 10)}]}}")
    return "\n".join(lines)


INVALID_YAML = {
    "a date": "name: 2020-99-99",
    "a date and time": "size: 2020-13-45 99:99:99",
    "year 0": "name: 0000-01-01",
    "time zone": "name: 2001-12-14t21:59:43.10-99:99",
    "timestamp": "name: !!timestamp foo",
    "nested lists": "a: " + "[" * 3000 + "]" * 3000,
    "nested mappings": "{a: " * 3000 + "1" + "}" * 3000,
    "open lists": "[" * 20_000,
    "digits": "limit: " + "9" * 5000,
    "many bits": "limit: 0x" + "f" * 5000,
    "65 bits": "{name: x, limit: 18446744073709551616}",
    "a large float": "{name: x, parts: [{rate: " + "9" * 400 + "}]}",
    "a large key": "{name: x, counts: {0x" + "f" * 5000 + ": 1}}",
    "a long key": "{name: x, counts: {" + "k" * 1000 + ": x}}",
    "a long name": "k" * 1000 + ": 1",
    "!!int": "limit: !!int foo",
    "!!int ''": "limit: !!int ''",
    "!!int 0b": "limit: !!int 0b",
    "!!float": "limit: !!float x",
    "!!float ''": "limit: !!float ''",
    "!!bool": "on: !!bool foo",
    "!!binary": "name: !!binary aaaa=b",
    "!!omap": "!!omap [a]",
    "code": "!!python/object/apply:os.system ['true']",
    "anchors": "limit: " + bomb(6),
    "merged keys": merge_bomb(6),
    "a key twice": "name: x\nname: y",
    "a key twice, inside": "name: x\nparts: [{rate: 1}, {rate: 1, kind: a, 'rate': 2}]",
    "itself": "a: &a [*a]",
    "itself as a key": "&a {? *a : 1}",
    "a list as a key": "? [a]\n: 2",
    "two documents": "a: 1\n---\nb: 2",
    "UTF-16": "name: x".encode("utf-16"),
    "a long text": "{name: x, parts: " + "x" * 10_000 + "}",
    "a large file": "name: x\n" + "#" * 2**20,
    "nothing": "",
    "a set": "!!set {a}",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", INVALID_YAML)
def test_invalid_yaml_is_refused_in_one_short_sentence(tmp_path, name):
    text = INVALID_YAML[name]
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        read_yaml(Outer, path)
    assert len(str(caught.value).replace(str(path), "c.yaml")) < 500
    assert "\n" not in str(caught.value)


def test_a_key_that_comes_twice_is_named_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\nparts:\n  - {rate: 1}\n  - rate: 2\n    rate: 3\n")
    with pytest.raises(UsageError, match="'rate' twice, again in line 5: remove one"):
        read_yaml(Outer, path)


def test_files_that_are_no_yaml(tmp_path):
    for path in (tmp_path / "none", tmp_path, tmp_path / "a\0b", "/dev/zero"):
        with pytest.raises(UsageError, match=r"The file .* (cannot be read|more than)"):
            read_yaml(Outer, path)


def test_anchors_are_allowed(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("parts: [&a {rate: 1}, *a, {<<: *a, kind: b}]\nname: x")
    assert read_yaml(Outer, path).parts == (Inner(1.0), Inner(1.0), Inner(1.0, "b"))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_check_finite(number):
    check_finite(Inner(1e308))
    with pytest.raises(UsageError, match="rate must be finite"):
        check_finite(Inner(number))
    with pytest.raises(UsageError, match="size must be finite"):
        check_finite(Outer("x", (1, number)))
