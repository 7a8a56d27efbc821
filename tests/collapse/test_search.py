"""The search on flat graphs: what a cut changes, layouts from shapes, and reasons in words."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg.collapse.alias import AliasAnalysis
from repvgg.collapse.symbolic_eval import SymbolicValues
from repvgg.symbolic import IMAGES, Layout
from tests.collapse.flat import flat_graph, plain, search
from tests.collapse.models import conv, image, module, trained


class Random(nn.Module):
    """A net of convolutions, norms, activations and sums, each of earlier outputs."""

    def __init__(self, seed: int, size: int = 24):
        super().__init__()
        choose = random.Random(seed)
        self.wiring = []
        for number in range(size):
            kind = choose.choice(["conv", "pointwise", "bn", "bn", "relu", "add", "add"])
            made = {"conv": conv, "pointwise": lambda: conv(kernel=1), "bn": lambda: nn.BatchNorm2d(4), "relu": nn.ReLU}
            self.add_module(f"part{number}", made[kind]() if kind in made else nn.Identity())
            self.wiring.append((kind, *(max(0, number - choose.randrange(4)) for _ in range(2))))

    def forward(self, x):
        values = [x]
        for number, (kind, first, second) in enumerate(self.wiring):
            if kind == "add":
                values.append(values[first] + values[second])
            else:
                values.append(getattr(self, f"part{number}")(values[first]))
        return values[-1], values[-5]


def facts(values):
    by_node = {node: (value.source, [s.node for s in value.steps], value.merged_cost) for node, value in values.items()}
    return {node.name: (source.name, [n.name for n in steps], cost) for node, (source, steps, cost) in by_node.items()}


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_gives_the_values_of_a_new_evaluation(seed):
    recording, options = flat_graph(trained(Random(seed)), image(dtype=torch.float64))
    aliasing = AliasAnalysis(recording)
    values = SymbolicValues(recording, aliasing, options.opaque)
    choose = random.Random(seed)
    for _ in range(6):
        if not values.by_node.keys() - values.cuts:
            return
        before = facts(values.by_node)
        node = choose.choice(sorted(values.by_node.keys() - values.cuts, key=values.order.__getitem__))
        changed = values.cut({node})
        fresh = SymbolicValues(recording, aliasing, options.opaque, cuts=values.cuts)
        assert facts(values.by_node) == facts(fresh.by_node)
        assert values.reasons == fresh.reasons
        # The search looks at these regions again, and at no others.
        after = facts(values.by_node)
        different = {n for n in {*before, *after} if before.get(n) != after.get(n)}
        sources = {facts_[n][0] for n in different for facts_ in (before, after) if n in facts_}
        assert sources <= {source.name for source in changed}


@pytest.mark.parametrize("seed", range(20))
def test_random_nets_compute_the_same_with_their_regions_replaced(seed):
    model, x = trained(Random(seed)), image()
    found = search(model, x)
    if found.merged:
        with torch.no_grad():
            for ours, theirs in zip(plain(model, found)(x), model(x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_cut_evaluates_only_what_depends_on_it(monkeypatch):
    class Net(nn.Module):
        """Blocks of a convolution with a norm that two other convolutions read, so that a region must end there."""

        def __init__(self, blocks=20):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.ModuleList([conv(), nn.BatchNorm2d(4), conv(kernel=1), conv(kernel=1)]) for _ in range(blocks)
            )

        def forward(self, x):
            for first, norm, left, right in self.blocks:
                y = norm(first(x))
                x = F.relu(left(y)) * F.relu(right(y))
            return x

    visited, visit = [], SymbolicValues._visit
    monkeypatch.setattr(SymbolicValues, "_visit", lambda self, node: (visited.append(node), visit(self, node)))
    found = search(trained(Net()), image())
    nodes = len(found.merged[0].region.recording.graph.nodes)
    assert len(found.merged) == 20
    assert found.were_cut
    assert nodes < len(visited) < 2 * nodes


def test_the_layout_is_that_which_the_first_layer_takes():
    parts = (nn.Linear(5, 7), nn.Linear(7, 3))
    model = trained(nn.Sequential(nn.ReLU(), *parts), torch.float32)
    found = search(model, torch.randn(2, 6, 4, 5))
    (region,) = (done.region for done in found.merged)
    assert region.value.symbol.layout == Layout(4, rows=True)
    source = region.value.start.symbol
    assert (source.map.out_channels, source.layout) == (5, Layout(4, rows=True))
    maps = trained(nn.Sequential(nn.ReLU(), conv(6, 2), nn.BatchNorm2d(2)), torch.float32)
    (region,) = (done.region for done in search(maps, torch.randn(2, 6, 4, 5)).merged)
    assert region.value.symbol.layout == IMAGES


def test_arithmetic_before_the_first_layer_is_part_of_its_region():
    model = trained(module(lambda self, x: F.relu(self.conv(F.relu(x) / 255)), conv=conv()))
    (region,) = (done.region for done in search(model, image()).merged)
    assert [step.operations for step in region.steps] == [("scale",), ("conv",)]


def test_a_number_that_is_computed_ends_a_region():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) * x.shape[2])

    found = search(trained(module(forward, conv=conv(), bn=nn.BatchNorm2d(4))), image())
    assert [[step.node.name for step in done.region.steps] for done in found.merged] == [["conv", "bn"]]
    reason = next(text for node, text in found.reasons.items() if node.name == "mul")
    assert "no floating-point tensor" in reason


def test_reasons_name_operations_and_where_they_are():
    def forward(self, x):
        y = torch.sigmoid(x)
        return self.bn(y * x)

    found = search(trained(module(forward, bn=nn.BatchNorm2d(4))), image())
    reason = next(text for node, text in found.reasons.items() if node.name == "bn")
    assert reason.startswith("its input comes from mul in the forward of the model, which is not folded: ")
