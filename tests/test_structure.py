from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from repvgg._structure import as_builtins, describe, leaves, map_leaves, map_tensors, tensors

Pair = namedtuple("Pair", ["boxes", "labels"])


@dataclass(frozen=True)
class Output:
    logits: object
    aux: object = None
    count: int = field(default=0)

    def __post_init__(self):
        assert not isinstance(self.logits, str), "the constructor must not run again"


class Instances:
    """Detectron2's way: an object that holds tensors in a dictionary."""

    def __init__(self, boxes):
        self.size = (4, 5)
        self._fields_ = {"boxes": boxes}


A, B = torch.tensor([1.0]), torch.tensor([2.0])


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (A, ["output"]),
        (None, ["output"]),
        ([A, B], ["output[0]", "output[1]"]),
        ((A, [B, None]), ["output[0]", "output[1][0]", "output[1][1]"]),
        ({"logits": A, 3: B}, ["output['logits']", "output[3]"]),
        (OrderedDict(a=A), ["output['a']"]),
        (defaultdict(list, a=[A]), ["output['a'][0]"]),
        (MappingProxyType({"a": A}), ["output['a']"]),
        (deque([A, B], maxlen=2), ["output[0]", "output[1]"]),
        (Pair(A, B), ["output.boxes", "output.labels"]),
        ([Pair(A, None)], ["output[0].boxes", "output[0].labels"]),
        (Output(A, {"x": B}), ["output.logits", "output.aux['x']", "output.count"]),
        (SimpleNamespace(a=A, b="text"), ["output.a", "output.b"]),
        (Instances(A), ["output.size[0]", "output.size[1]", "output._fields_['boxes']"]),
        (torch.max(torch.ones(2, 2), 1), ["output[0]", "output[1]"]),
        ({"empty": [], "a": A}, ["output['empty']", "output['a']"]),
        (SimpleNamespace(no_tensor=1), ["output"]),
    ],
)
def test_every_leaf_has_the_name_that_reads_it(value, names):
    found = leaves(value)
    assert [name for name, _ in found] == names
    for name, leaf in found:
        assert eval(name, {"output": value}) is leaf or eval(name, {"output": value}) == leaf


@pytest.mark.parametrize(
    "value",
    [
        [A, (B, None)],
        Pair(A, [B]),
        OrderedDict(a=A, b=B),
        Output(A, [B], 3),
        SimpleNamespace(a=A, b="text"),
        deque([A, B], maxlen=3),
    ],
)
def test_mapping_keeps_classes_and_other_leaves_and_leaves_the_original_alone(value):
    before = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for _, leaf in leaves(value)]
    doubled = map_tensors(lambda x: 2 * x, value)
    assert type(doubled) is type(value)
    for (name, old), (new_name, new), kept in zip(leaves(value), leaves(doubled), before, strict=True):
        assert name == new_name
        if isinstance(old, torch.Tensor):
            assert_close(new, 2 * kept, rtol=0, atol=0)
            assert_close(old, kept, rtol=0, atol=0)
        else:
            assert new == old == kept


def test_a_default_dictionary_keeps_its_factory_and_a_deque_its_length():
    assert map_leaves(lambda x: x, defaultdict(list, a=A))["missing"] == []
    assert map_leaves(lambda x: x, deque([A], maxlen=7)).maxlen == 7


def test_an_object_that_contains_itself_ends():
    loop = SimpleNamespace(a=A)
    loop.me = loop
    assert [name for name, _ in leaves(loop)] == ["output.a", "output.me"]
    items = [A]
    items.append(items)
    assert [name for name, _ in leaves(items)] == ["output[0]", "output[1]"]


def test_modules_functions_and_classes_are_leaves():
    values = [torch.nn.Linear(1, 1), torch.relu, torch.nn.Linear, torch]
    assert [leaf for _, leaf in leaves(values)] == values
    assert tensors(values) == []


def test_a_leaf_is_described_in_one_short_line():
    assert describe(torch.zeros(2, 3, dtype=torch.int64)) == "int64 (2, 3)"
    assert describe("feat") == "'feat'"
    assert len(describe("x" * 500)) == 60


def test_outputs_of_transformers_are_read_as_mappings():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.ImageClassifierOutput(logits=A, hidden_states=(B,))
    assert [name for name, _ in leaves(value)] == ["output['logits']", "output['hidden_states'][0]"]
    doubled = map_tensors(lambda x: 2 * x, value)
    assert type(doubled) is type(value)
    assert_close(doubled.logits, 2 * A, rtol=0, atol=0)
    assert_close(doubled["hidden_states"][0], 2 * B, rtol=0, atol=0)


def test_other_containers_become_builtin_ones():
    value = {"a": Output(A, Pair(B, None)), 3: deque([A]), "b": MappingProxyType({"x": (A, [B])}), "c": Instances(A)}
    assert as_builtins(value) == {
        "a": {"logits": A, "aux": {"boxes": B, "labels": None}, "count": 0},
        3: [A],
        "b": {"x": (A, [B])},
        "c": {"size": (4, 5), "_fields_": {"boxes": A}},
    }
    assert as_builtins(A) is A
