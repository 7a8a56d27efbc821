"""Forwards with optional arguments, several inputs or outputs, and data-dependent control flow."""

import enum
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import NothingFoldedWarning, UsageError
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


def test_optional_argument_that_selects_another_path():
    def forward(self, x, both=False):
        y = self.act(self.bn(self.conv(x)))
        return (y, self.act(self.conv(x))) if both else y

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), both=True)
    assert report.folded == ()


def test_path_that_uses_an_intermediate_result():
    def forward(self, x, early=False):
        y = self.conv(x)
        return y if early else self.act(self.bn(y))

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), early=True)
    assert report.folded == ()


def test_optional_argument_that_does_not_affect_a_chain():
    def forward(self, x, mask=None, *, scale=2.0):
        y = self.act(self.bn(self.conv(x))) * scale
        return y if mask is None else y * mask

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), image(seed=5), scale=0.5)
    assert len(report.folded) == 1


def test_branches_are_not_merged_for_the_defaults_alone():
    def forward(self, x, scale=2.0):
        return self.act(self.bn(self.conv(x)) * scale + self.other(x))

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), 3.0)
    assert [entry.name for entry in report.folded] == ["conv"]  # the norm alone
    assert report.left == ()


def test_a_norm_is_not_folded_for_the_defaults_alone():
    def forward(self, x, scale=2.0):
        return self.act(self.bn(self.conv(x) * scale) + self.other(x))

    model = trained(module(forward, **parts()))
    plain, report = check(model, image())
    assert_same_outputs(model, plain, image(), 3.0)
    assert "optional arguments" in report.left[0].reason


class Task(enum.Enum):
    FEATURES, CLASSES = 1, 2


@dataclass(frozen=True)
class Options:
    features: bool = False


def by_text(self, x, task="classes"):
    y = self.conv(x)
    return y if task == "features" else self.bn(y)


def by_enum(self, x, task=Task.CLASSES):
    y = self.conv(x)
    return y if task is Task.FEATURES else self.bn(y)


def by_config(self, x, options=Options()):
    y = self.conv(x)
    return y if options.features else self.bn(y) * 2.0


def by_any_number(self, x, *others):
    return self.bn(self.conv(x) + sum(map(self.other, others)))


def by_any_name(self, x, **options):
    y = self.conv(x)
    return y if options.get("features") else self.bn(y)


def by_two(self, x, features=False, early=False):
    y = self.conv(x)
    return y if features and early else self.bn(y)


def by_class(self, x, layers=(0,)):
    y = self.conv(x)
    return y if isinstance(layers, int) else self.bn(y)


def by_identity(self, x, early=None):
    y = self.conv(x)
    return y if early is True else self.bn(y)


def by_structure(self, x):
    return [self.bn(self.other(y)) for y in x] if isinstance(x, list) else self.bn(self.conv(x))


@pytest.mark.parametrize("given", [None, "default", "other"])
@pytest.mark.parametrize(
    ("forward", "args", "kwargs"),
    [
        (by_text, (), {"task": "features"}),
        (by_enum, (), {"task": Task.FEATURES}),
        (by_config, (), {"options": Options(True)}),
        (by_any_number, (image(seed=5),), {}),
        (by_any_name, (), {"features": True}),
        (by_two, (), {"features": True, "early": True}),
        (by_class, (), {"layers": 0}),
        (by_identity, (), {"early": True}),
        (by_structure, None, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_argument_that_selects_never_changes_an_answer(forward, args, kwargs, given):
    """The plain model answers as the model does, or refuses the call."""
    model = trained(module(forward, **parts()))
    calls = {
        "default": ((image(),), {}),
        "other": (([image(), image(seed=3)],) if args is None else (image(), *args), kwargs),
    }
    inputs = None
    if given:
        positional, named = calls[given]
        inputs = {"x": positional[0], **named} if named else positional
    with warnings.catch_warnings(action="ignore", category=NothingFoldedWarning):
        plain, _ = repvgg.reparameterize(model, inputs)
    for name, (positional, named) in calls.items():
        refusal = ""
        try:
            plain(*positional, **named)
        except UsageError as error:
            refusal = str(error)
        if refusal:
            assert "collapsed for" in refusal
            assert given not in (None, name)
        else:
            assert_same_outputs(model, plain, *positional, **named)


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


def unused_path(self, x):
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
        (unused_path, (image(),)),
        (checked, (image(),)),
        (on_size, (image(),)),
        (on_value, (image(),)),
        (on_a_parameter, (image(),)),
        (own_numbers, (image(),)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_inputs_outputs_and_control_flow(forward, inputs):
    model = trained(module(forward, **parts()))
    plain, report = check(model, *inputs)
    assert report.folded or report.left
    assert_same_outputs(model, plain, *inputs)


def test_untraceable_root_is_reported_and_its_blocks_are_folded():
    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.mean() > 0 else self.c(x)

    plain, report = check(trained(module(forward, a=Branches(), b=Block(), c=Linear2d())), image())
    assert {entry.name for entry in report.folded} == {"a.conv", "b.conv", "c"}
    assert report.left == ()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_images_are_still_accepted(dtype):
    """``x / 255`` converts to floating point; a merged convolution would not."""
    model = trained(module(lambda self, x: F.relu(self.conv(x / 255) + self.other(x / 255)), **parts()), torch.float32)
    x = torch.arange(2 * 4 * 9 * 11).view(2, 4, 9, 11).remainder(251).to(dtype)
    plain, _ = collapse(model)
    assert_same_outputs(model, plain, x, tolerance=1e-5)


def test_one_channel_images_still_broadcast():
    model = module(lambda self, x: F.relu(self.conv((x - self.mean) / 2)), conv=conv(kernel=1))
    model.register_buffer("mean", torch.rand(1, 4, 1, 1))
    model = trained(model)
    plain, _ = collapse(model)
    assert_same_outputs(model, plain, image(1))
    assert_same_outputs(model, plain, image(4))


def test_model_without_norms_in_training_mode_gives_its_eval_form():
    def forward(self, x):
        return F.relu(self.conv(x)) if self.training else F.relu(self.conv(x) + self.other(x))

    model = trained(module(forward, **parts())).train()
    model.bn.eval()
    plain, _ = collapse(model)
    model.eval()
    assert_same_outputs(model, plain.eval(), image())


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(1, 3, 8, 8), r"float32 \(1, 3, 8, 8\).*'conv'"),
        (torch.zeros(4, dtype=torch.float64), r"float64 \(4,\).*'conv'"),
        ({"y": image()}, r"inputs\[0\]\['y'\]"),
        ([image(), image()], r"takes \(x\)"),
    ],
)
@pytest.mark.parametrize("function", [repvgg.reparameterize, repvgg.is_plain])
def test_inputs_that_a_model_does_not_take(function, inputs, said):
    """The sentence names the shapes, and what the first layer or the forward takes."""
    model = trained(module(lambda self, x: self.act(self.bn(self.conv(x))), **parts()))
    with pytest.raises(UsageError, match=said) as caught:
        function(model, inputs)
    assert "\n" not in str(caught.value)


def test_a_forward_that_raises_an_error_of_its_own():
    def forward(self, x):
        raise KeyError("size of the window")

    with pytest.raises(UsageError, match=r"does not run on .* \(KeyError: 'size of the window'\)"):
        repvgg.reparameterize(trained(module(forward, **parts())), image())
