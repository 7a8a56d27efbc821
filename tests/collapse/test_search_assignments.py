"""The search on graphs with item assignments and with sizes that a run recorded, as nodes of their own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.testing import assert_close

import repvgg
from repvgg.collapse.regions import find_regions
from repvgg.collapse.solution import solve_region
from repvgg.errors import BorderError, NothingFoldedWarning
from repvgg.symbolic import assign_item
from tests.bn_statistics import trained_like
from tests.collapse.flat import flat_graph, plain, search

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def assigned(target, index, value):
    """Record ``target[index] = value``; torch.fx does not."""
    return target.tracer.create_proxy("call_function", assign_item, (target, index, value), {})


class NormAndPad(nn.Module):
    """A branch as DBB has it, which pads with what the norm gives for zeros, beside a convolution."""

    def __init__(self, factor=1.0, sides=4):
        super().__init__()
        self.dense, self.point, self.last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)
        self.point.bias, self.bn, self.factor, self.sides = None, nn.BatchNorm2d(4), factor, sides

    def forward(self, x):
        y = F.pad(self.bn(self.point(x)), [1] * 4)
        v = self.bn.bias - self.bn.running_mean * self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
        v = (v * self.factor).view(1, -1, 1, 1)
        every = slice(None)
        for axis, side in [(2, slice(0, 1)), (2, slice(-1, None)), (3, slice(0, 1)), (3, slice(-1, None))][
            : self.sides
        ]:
            y = assigned(y, (*(every,) * axis, side), v)
        return F.relu(self.dense(x) + self.last(y))


X = torch.randn(2, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_border_that_holds_the_bias_is_part_of_the_region():
    model = trained_like(NormAndPad()).double()
    expected = fx.symbolic_trace(model)(X)
    found = search(model, X)
    (merged,) = found.merged
    assert [step.operations for step in merged.region.steps].count(("assign",)) == 4
    assert_close(plain(model, found)(X), expected, **EXACT)


@pytest.mark.parametrize("factor", [1.0, 1.0001])
def test_a_float32_model_computes_what_it_assigns_in_float32(factor):
    """It differs from the bias in float64 by roundings, as the published DBB's does."""

    class Written(NormAndPad):
        def forward(self, x):
            y = F.pad(self.bn(self.point(x)), [1] * 4)
            v = self.bn.bias - self.bn.running_mean * self.bn.weight / torch.sqrt(self.bn.running_var + self.bn.eps)
            v = (v * self.factor).view(1, -1, 1, 1)
            y[:, :, :1], y[:, :, -1:], y[..., :1], y[..., -1:] = v, v, v, v
            return F.relu(self.dense(x) + self.last(y))

    model = trained_like(Written(factor=factor)).float().eval()
    with warnings.catch_warnings(action="ignore", category=NothingFoldedWarning):
        merged, report = repvgg.reparameterize(model)
    torch.testing.assert_close(merged(X.float()), model(X.float()), rtol=1e-5, atol=1e-5)
    assert repvgg.is_plain(merged) == (factor == 1.0) == bool(report.folded)


def test_with_values_another_border_is_refused():
    model = trained_like(NormAndPad(factor=2.0)).double()
    (merged,) = search(model, X).merged
    with pytest.raises(BorderError, match="differs from what the layer"):
        solve_region(merged.region)


def test_a_border_that_is_not_complete_ends_the_region():
    model = trained_like(NormAndPad(sides=3)).double()
    expected = fx.symbolic_trace(model)(X)
    found = search(model, X)
    assert all(assign_item not in [step.node.target for step in done.region.steps] for done in found.merged)
    assert all(reason for reason in found.reasons.values())
    if found.merged:
        assert_close(plain(model, found)(X), expected, **EXACT)


class Tokens(nn.Module):
    """A linear layer over the pixels as tokens, and back to images by sizes that were read from them."""

    def __init__(self, scale=False):
        super().__init__()
        self.conv, self.linear, self.bn, self.scale = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.BatchNorm2d(4), scale

    def forward(self, x):
        x = torch.relu(self.conv(x))
        n, h, w = x.size(0), x.size(2), x.size(3)
        y = self.linear(x.flatten(2).transpose(1, 2))
        y = y * h if self.scale else y
        return torch.relu(self.bn(y.transpose(1, 2).reshape(n, 4, h, w)) + x)


def record_sizes(graph, module, x):
    """Note the numbers of a run in the graph, as a recorder does."""

    class Sizes(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, int):
                n.meta.update(number=True, value=result)
            return result

    with torch.no_grad():
        Sizes(fx.GraphModule(module, graph), graph=graph).run(x)


@pytest.mark.parametrize("scale", [False, True])
def test_a_reshape_to_recorded_sizes_is_followed_and_arithmetic_with_them_is_not(scale):
    model = trained_like(Tokens(scale)).double()
    expected = model(X)
    recording, options = flat_graph(model, X)
    record_sizes(recording.graph, model, X)
    found = find_regions(recording, options)
    targets = {str(step.node.target) for done in found.merged for step in done.region.steps}
    if scale:
        assert "linear" not in targets
        assert any("size of the image" in reason for reason in found.reasons.values())
    else:
        assert {"linear", "bn", "reshape"} <= targets
        assert all(done.region.reads_sizes for done in found.merged)
        assert_close(plain(model, found)(X), expected, **EXACT)
