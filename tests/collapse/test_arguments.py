"""Forwards with optional arguments, several inputs, several outputs, and flow that depends on things."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.collapse.models import (
    Block,
    Branches,
    Linear2d,
    assert_same_outputs,
    check,
    collapse,
    conv,
    image,
    module,
    trained,
)


def parts():
    return {"conv": conv(), "bn": nn.BatchNorm2d(4), "act": nn.ReLU(), "other": conv(kernel=1)}


def test_an_optional_argument_that_takes_another_way():
    def forward(self, x, both=False):
        y = self.act(self.bn(self.conv(x)))
        return (y, self.act(self.conv(x))) if both else y

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), both=True)
    assert report.folded == ()


def test_a_way_that_uses_the_outcome_in_between():
    def forward(self, x, early=False):
        y = self.conv(x)
        return y if early else self.act(self.bn(y))

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), early=True)
    assert report.folded == ()


def test_an_optional_argument_beside_a_chain_does_no_harm():
    def forward(self, x, mask=None, *, scale=2.0):
        y = self.act(self.bn(self.conv(x))) * scale
        return y if mask is None else y * mask

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), image(seed=5), scale=0.5)
    assert len(report.folded) == 1


def test_branches_are_not_merged_for_the_defaults_only():
    def forward(self, x, scale=2.0):
        return self.act(self.bn(self.conv(x)) * scale + self.other(x))

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), 3.0)
    assert "optional arguments" in report.left[0].reason


def gathered(self, *images, **rest):
    return self.act(self.bn(self.conv(images[0])) + self.other(images[0]))


def named(self, images):
    return {"y": self.act(self.bn(self.conv(images["x"])) + self.other(images["x"])), "x": [images["x"]]}


def two(self, x, y):
    return self.act(self.bn(self.conv(x)) + self.other(x)), self.act(self.conv(y))


def by_keyword(self, x):
    return self.act(self.bn(input=self.conv(input=x)))


def exits(self, x):
    y = self.conv(x)
    z = self.bn(y)
    return {"a": y, "b": (z, self.act(z)), "c": self.act(z + self.other(x))}


def unused_way(self, x):
    self.other(x)
    y = self.bn(self.conv(x))
    y + 1
    return self.act(y)


def checked(self, x):
    assert isinstance(x, torch.Tensor)
    return self.act(self.bn(self.conv(x)))


def on_size(self, x):
    y = self.bn(self.conv(x))
    return self.act(y) + 1 if x.shape[-1] > 30 else self.act(y)


def on_value(self, x):
    y = self.act(self.bn(self.conv(x)))
    return y + self.act(self.conv(x)) if x.mean() > 0 else y


def on_a_parameter(self, x):
    y = self.bn(self.conv(x)) * float(self.bn.weight[0])
    return self.act(y) if float(self.other.bias.sum()) > -1e9 else x


def own_numbers(self, x):
    gate = torch.arange(4.0).to(x).view(1, 4, 1, 1)
    return self.act(self.bn(self.conv(x)) * gate + self.other(x)) * torch.full((1,), 3.0).to(x)


@pytest.mark.parametrize(
    ("forward", "inputs"),
    [
        (gathered, (image(),)),
        (named, ({"x": image()},)),
        (two, (image(), image(seed=7))),
        (by_keyword, (image(),)),
        (exits, (image(),)),
        (unused_way, (image(),)),
        (checked, (image(),)),
        (on_size, (image(),)),
        (on_value, (image(),)),
        (on_a_parameter, (image(),)),
        (own_numbers, (image(),)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_inputs_outputs_and_flow(forward, inputs):
    model = trained(module(forward, **parts()))
    plain, report = check(model, *inputs)
    assert report.folded or report.left
    assert_same_outputs(model, plain, *inputs)


def test_an_untraceable_root_says_so_and_its_blocks_are_folded():
    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.mean() > 0 else self.c(x)

    plain, report = check(trained(module(forward, a=Branches(), b=Block(), c=Linear2d())), image())
    assert {row.name for row in report.folded} == {"a.conv", "b.conv", "c"}
    assert report.left == ()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_of_integers_are_still_taken(dtype):
    """``x / 255`` makes real numbers of them; a merged convolution could not."""
    model = trained(module(lambda self, x: F.relu(self.conv(x / 255) + self.other(x / 255)), **parts()), torch.float32)
    x = torch.arange(2 * 4 * 9 * 11).view(2, 4, 9, 11).remainder(251).to(dtype)
    plain, _ = collapse(model)
    assert_same_outputs(model, plain, x, tolerance=1e-5)


def test_images_of_one_channel_are_still_spread_over_many():
    model = module(lambda self, x: F.relu(self.conv((x - self.mean) / 2)), conv=conv(kernel=1))
    model.register_buffer("mean", torch.rand(1, 4, 1, 1))
    model = trained(model)
    plain, _ = collapse(model)
    assert_same_outputs(model, plain, image(1))
    assert_same_outputs(model, plain, image(4))


def test_a_model_in_training_mode_without_norms_gives_its_eval_form():
    def forward(self, x):
        return F.relu(self.conv(x)) if self.training else F.relu(self.conv(x) + self.other(x))

    model = trained(module(forward, **parts())).train()
    model.bn.eval()
    plain, _ = collapse(model)
    model.eval()
    assert_same_outputs(model, plain.eval(), image())
