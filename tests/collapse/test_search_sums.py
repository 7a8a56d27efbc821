"""Sums of several addends: those that one convolution computes are merged, in whatever order the model adds them."""

import operator
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.collapse.flat import ANYWHERE, plain, search
from tests.collapse.models import check, conv, image, module, trained

PARTS = ("conv3x3", "dilated", "identity")
ORDERS = list(permutations(PARTS))


def branches(forward):
    """Return a module of a 3x3, a dilated and an identity branch, each with a norm."""
    return trained(
        module(
            forward,
            conv3x3=nn.Sequential(conv(), nn.BatchNorm2d(4)),
            dilated=nn.Sequential(conv(dilation=2, padding=2), nn.BatchNorm2d(4)),
            identity=nn.BatchNorm2d(4),
            other=nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        )
    )


def in_order(names):
    def forward(self, x):
        a, b, c = (getattr(self, name)(x) for name in names)
        return F.relu(a + b + c)

    return branches(forward)


def norms(model):
    return sum(isinstance(part, _BatchNorm) for part in model.modules())


def assert_equal(model, found, x, used):
    """Check the edited graph, and that it uses the given parts of the model and no others."""
    new = plain(model, found)
    with torch.no_grad():
        torch.testing.assert_close(new(x), model(x), rtol=1e-11, atol=1e-11)
    assert {str(node.target) for node in new.graph.nodes if node.op == "call_module"} == used


@pytest.mark.parametrize("names", ORDERS, ids="+".join)
def test_the_identity_merges_with_a_convolution_in_any_order(names):
    model, x = in_order(names), image()
    found = search(model, x)
    # The two convolutions have 9 taps each, and 25 together.
    assert [done.region.value.merged_cost.weights for done in found.merged] == [16 * 9, 16 * 9]
    # The operands of one addition, the first, are no part of a sum but all of it.
    together = "identity" in names[:2]
    assert [len(done.region.addends) for done in found.merged] == ([0, 0] if together else [0, 2])
    assert_equal(model, found, x, {"merged0", "merged1"})


@pytest.mark.parametrize("names", ORDERS, ids="+".join)
def test_no_norm_is_left_by_a_collapse(names):
    plain_model, report = check(in_order(names), image())
    assert norms(plain_model) == 1  # that of the unused part
    assert len(report.folded) == 2


def test_additions_in_place_and_by_function():
    def forward(self, x):
        out = 0 + self.dilated(x)
        out = out.add_(self.other(x))
        out = torch.add(out, self.conv3x3(x))
        out = operator.iadd(out, self.identity(x))
        return F.relu(out)

    model, x = branches(forward), image()
    found = search(model, x)
    assert [len(done.region.addends) for done in found.merged] == [0, 2]
    assert_equal(model, found, x, {"merged0", "merged1", "other.0", "other.1"})
    assert norms(check(model, x)[0]) == 1


def test_the_source_itself_is_an_addend():
    def forward(self, x):
        return F.relu(x + self.other(x) + self.conv3x3(x))

    model, x = branches(forward), image()
    found = search(model, x)
    assert [done.region.addends[1].op for done in found.merged] == ["placeholder"]
    assert_equal(model, found, x, {"merged0", "other.0", "other.1"})


def test_two_parts_of_one_sum():
    def forward(self, x):
        y = self.other(x)
        return F.relu((self.conv3x3(x) + self.dilated(y)) + self.identity(x) + y)

    model, x = branches(forward), image()
    found = search(model, x)
    assert [len(done.region.addends) for done in found.merged] == [2, 2]
    assert_equal(model, found, x, {"merged0", "merged1", "other.0", "other.1"})
    check(model, x)


def test_an_addition_that_would_lose_both_operands_keeps_one():
    def forward(self, x):
        y = self.other(x)
        return F.relu((self.conv3x3(x) + self.dilated(y)) + (self.identity(x) + y))

    model, x = branches(forward), image()
    found = search(model, x)
    assert [len(done.region.addends) for done in found.merged] == [0, 2]
    assert_equal(model, found, x, {"merged0", "merged1", "other.0", "other.1"})


def test_a_partial_sum_that_is_read_elsewhere_stays():
    def forward(self, x):
        first = self.conv3x3(x) + self.other(x)
        return F.relu(first + self.identity(x)) + F.relu(first)

    found = search(branches(forward), image())
    assert not any(done.region.addends for done in found.merged)


def test_an_addend_that_is_read_elsewhere_stays():
    def forward(self, x):
        first = self.conv3x3(x)
        return F.relu(first + self.other(x) + self.identity(x)) + F.relu(first)

    found = search(branches(forward), image())
    assert not any(done.region.addends for done in found.merged)


def test_an_addend_that_stays_is_not_written_to():
    def forward(self, x):
        y, z = self.other(x), F.relu(x)
        right = self.identity(x) + y
        right = right.add_(z)
        return F.relu((self.conv3x3(x) + z) + right) + y

    model, x = branches(forward), image()
    found = search(model, x)
    assert not any(done.region.addends for done in found.merged)
    check(model, x)


def test_a_weighted_sum_and_a_sum_with_a_constant_stay():
    def forward(self, x):
        weighted = torch.add(self.conv3x3(x), self.other(x), alpha=2) + self.identity(x)
        return F.relu(weighted) + F.relu(self.conv3x3(x) + self.offset + self.identity(x))

    model = branches(forward)
    model.register_buffer("offset", torch.randn(1, 4, 13, 18, dtype=torch.float64))
    found = search(model, image())
    assert not any(done.region.addends for done in found.merged)


def test_branches_stay_where_only_norms_are_folded():
    found = search(in_order(PARTS), image(), merge_branches=False)
    assert not any(done.region.addends for done in found.merged)


def test_a_part_without_a_place_stays_apart():
    def find(region):
        return "there is no place for it" if region.addends else ANYWHERE

    found = search(in_order(PARTS), image(), find_insertion=find)
    assert [done.region.addends for done in found.merged] == [(), ()]
