import copy

import pytest
import torch
from torch import Tensor, nn

from repvgg.verify import border_inputs, verify
from repvgg.verify.layers import matching_units
from tests.verify.models import conv_bn_relu, folded, net, trained_like

IMAGES = border_inputs((6, 3, 10, 10), batches=1)


def by_name(evidence):
    return {layer.name: layer for layer in evidence.layers}


def test_units_of_equal_models_are_leaves_with_parameters():
    model = net()
    assert matching_units(model, copy.deepcopy(model)) == ["first.0", "first.1", "second.0", "second.1", "head"]


def test_parent_of_a_folded_batch_norm_is_a_unit():
    model = net()
    candidate = copy.deepcopy(model)
    candidate.second = folded(model).second
    assert matching_units(model, candidate) == ["first.0", "first.1", "second", "head"]


def test_merged_branches_are_a_unit():
    def block(conv: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Sequential(conv, nn.ReLU()), nn.Conv2d(4, 4, 1))

    branches = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 1)})
    assert matching_units(block(branches), block(nn.Conv2d(3, 4, 3))) == ["0.0", "1"]


def test_containers_of_a_differing_root_are_walked():
    model, candidate = net(), net()
    model.auxiliary = nn.Linear(8, 2)
    assert matching_units(model, candidate) == ["first.0", "first.1", "second.0", "second.1"]
    assert matching_units(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)) == []


def test_own_error_is_separated_from_that_of_earlier_layers():
    model = net()
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        candidate.second[0].weight.mul_(1.01)
    table = by_name(verify(model, candidate, IMAGES))
    assert list(table) == ["first.0", "first.1", "second.0", "second.1", "head"]
    assert table["second.0"].own_error == pytest.approx(0.01, rel=1e-3)
    assert table["second.0"].accumulated_error == pytest.approx(0.01, rel=1e-3)
    for name in ("first.0", "first.1", "second.1", "head"):
        assert table[name].own_error < 1e-5
    assert table["first.1"].accumulated_error < 1e-5
    assert min(table["second.1"].accumulated_error, table["head"].accumulated_error) > 1e-3


def test_in_place_relu_does_not_change_captured_outputs():
    """Both batch norms are followed by an in-place ReLU, which would overwrite an output that is not cloned."""
    model = net()
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        candidate.first[1].bias.sub_(100.0)
        model.first[1].bias.sub_(50.0)
    table = by_name(verify(model, candidate, IMAGES))
    assert table["first.1"].own_error > 0.5
    assert table["first.1"].accumulated_error > 0.5
    assert table["second.0"].own_error == 0.0, "all zeros on both sides"


def test_captured_input_survives_a_later_in_place_add():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1.0
            return x.add_(self.body(x))

    model = Residual()
    assert by_name(verify(model, copy.deepcopy(model), IMAGES))["body"].own_error < 1e-6


class Pair(nn.Conv2d):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.never = nn.Conv2d(3, 3, 1)
        self.pair = Pair(3, 2, 1)
        self.once = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.once(self.twice(self.twice(x))))[0]


def test_units_without_a_single_output_are_left_out_and_named():
    model = Shared()
    evidence = verify(model, copy.deepcopy(model), IMAGES)
    assert evidence.passed
    assert [layer.name for layer in evidence.layers] == ["once"]
    assert "no errors of twice, never, pair" in evidence.notes[0]


class Stateful(nn.Module):
    """The second unit depends on state that its parent sets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.guarded = Guarded()

    def forward(self, x: Tensor) -> Tensor:
        self.guarded.open = True
        y = self.guarded(self.conv(x), scale=torch.full((1,), 2.0, dtype=x.dtype))
        self.guarded.open = False
        return y


class Guarded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.open = False

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.open:
            raise ValueError("closed")
        return x * self.weight * scale


def test_unit_that_cannot_run_alone_has_no_own_error():
    model = Stateful()
    evidence = verify(model, copy.deepcopy(model), IMAGES)
    assert evidence.passed
    table = by_name(evidence)
    assert table["guarded"].own_error is None
    assert table["guarded"].accumulated_error < 1e-6
    assert "guarded" not in [layer.name for layer in evidence.worst_layers()]


def test_keyword_arguments_are_passed_to_a_unit_run_alone():
    model = Stateful()
    model.guarded.__dict__["open"] = True
    candidate = copy.deepcopy(model)
    candidate.guarded.register_forward_pre_hook(lambda module, args: module.__dict__.update(open=True))
    assert by_name(verify(model, candidate, IMAGES))["guarded"].own_error < 1e-6


def test_only_four_images_are_used():
    seen = []
    model = nn.Sequential(conv_bn_relu(3, 4), nn.Flatten())
    candidate = copy.deepcopy(trained_like(model))
    candidate[0][0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    assert verify(model, candidate, IMAGES).layers
    assert sorted(seen) == [
        4,
        4,
        6,
        6,
    ]  # 4: the unit alone, and end to end; 6: both dtypes


def test_hooks_are_removed_after_an_error():
    model = net()

    class Failing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 5:
                raise RuntimeError("too few")
            return super().forward(x)

    candidate = copy.deepcopy(model)
    candidate.second = Failing(*candidate.second)
    evidence = verify(model, candidate, IMAGES)
    assert evidence.passed
    assert evidence.notes == ("no table of layers (too few)",)
    for module in (*model.modules(), *candidate.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
