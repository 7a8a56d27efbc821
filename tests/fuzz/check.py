"""The properties that hold for every program; call ``check`` to replay one example."""

import copy
import json
import warnings

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import repvgg
from repvgg.errors import NothingFoldedWarning
from repvgg.measure import walk
from tests.fuzz.network import image, network
from tests.fuzz.program import Program
from tests.fuzz.strategies import SIZES

TOLERANCE = 1e-10


def check(program: Program) -> tuple[nn.Module, repvgg.Report]:
    """Collapse the network of a program twice, and check every guarantee."""
    net = network(program)
    before = copy.deepcopy(net.state_dict())
    plain, report = collapse(net)
    assert_identical(net.state_dict(), before)
    again, second = collapse(plain)
    for size in SIZES:
        assert_equal(net, plain, image(3, size))
        assert_equal(plain, again, image(3, size))
    assert_not_more_expensive(net, plain, report)
    assert str(report)
    assert json.loads(json.dumps(report.to_dict()))["folded"] or not report.folded
    assert not second.folded, second
    return plain, report


def collapse(net: nn.Module) -> tuple[nn.Module, repvgg.Report]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        return repvgg.reparameterize(net)


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_equal(net: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Check that outputs differ by at most 1e-10 of the largest number in any of them, or of 1 if that is larger."""
    with torch.no_grad():
        expected, found = tree_leaves(net(x.clone())), tree_leaves(plain(x.clone()))
    largest = max(1.0, *(float(y.abs().max()) for y in expected))
    assert [y.shape for y in found] == [y.shape for y in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= TOLERANCE * largest


def assert_not_more_expensive(net: nn.Module, plain: nn.Module, report: repvgg.Report) -> None:
    """Check that multiply-adds do not increase. Skips nets with average pools, which the walk counts as zero."""
    if not any(isinstance(part, nn.AvgPool2d) for part in net.modules()):
        x = image(3, SIZES[0])
        assert walk(plain, x).macs <= walk(net, x).macs, report
