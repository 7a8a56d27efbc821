"""Kernels that a forward computes: by utilities of torch, or assigned to the data of a parameter."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import repvgg
from repvgg.errors import NothingFoldedWarning
from tests.collapse.foreign.harness import default_dtype
from tests.collapse.models import assert_same_outputs, conv, image, module, trained


@pytest.fixture(autouse=True)
def float64():
    """Hooks keep tensors in attributes, which no conversion of a module reaches."""
    torch.manual_seed(0)
    with default_dtype(torch.float64):
        yield


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")

UTILITIES = {
    "weight norm, hook": nn.utils.weight_norm,
    "weight norm": parametrizations.weight_norm,
    "spectral norm, hook": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda m: prune.l1_unstructured(prune.l1_unstructured(m, "weight", amount=0.4), "bias", amount=1),
    "weight norm, pruned": lambda m: prune.l1_unstructured(nn.utils.weight_norm(m), "weight_v", amount=0.4),
}
CALLS = {
    "call": lambda self, x: self.conv(x),
    "call of forward": lambda self, x: self.conv.forward(x),
    "weight": lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, padding=1),
    "branches": lambda self, x: self.conv(x) + x,
}


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("utility", UTILITIES)
def test_nothing_stays_of_what_a_utility_computes_a_kernel_from(utility, call, has_norm):
    def forward(self, x):
        y = CALLS[call](self, x)
        return F.relu(self.bn(y) if has_norm else y)

    model = trained(module(forward, conv=UTILITIES[utility](conv()), bn=nn.BatchNorm2d(4) if has_norm else None))
    with torch.no_grad():
        model(image())  # hooks that compute what earlier ones read need a call
    plain, report = repvgg.reparameterize(model)
    assert len(report.folded) == 1
    assert_same_outputs(model, plain, image())
    assert sum(p.numel() for p in plain.parameters()) == 4 * 4 * 9 + 4
    assert list(plain.buffers()) == []


@pytest.mark.parametrize("call", ["call", "call of forward", "weight"])
def test_a_batch_norm_with_pruned_parameters_folds(call):
    def forward(self, x):
        return F.relu(self.bn(CALLS[call](self, x)))

    model = trained(module(forward, conv=conv(), bn=nn.BatchNorm2d(4)))
    prune.l1_unstructured(model.bn, "weight", amount=0.3)
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1
    assert report.left == ()
    assert_same_outputs(model, plain, image(seed=3))


def composed(self):
    return F.conv2d(self.b, self.a.permute(1, 0, 2, 3))


def loop_over_channels(self):
    kernel = torch.zeros(4, 4, 3, 3)
    for i in range(4):
        kernel[i, i, :, :] = self.b[i, 0, :, :]
    return kernel + composed(self)


def of_conv(forward, **parts):
    parts = {"conv": conv(), "bn": nn.BatchNorm2d(4)} | parts
    model = module(forward, a=nn.Parameter(torch.randn(6, 4, 1, 1)), b=nn.Parameter(torch.randn(4, 6, 3, 3)), **parts)
    return trained(model)


def check_untouched(model, *inputs):
    """Collapse a model that changes itself when it is called; return plain model and report."""
    reference, parts = copy.deepcopy(model), dict(vars(model))
    addresses = [p.data_ptr() for p in model.parameters()]
    plain, report = repvgg.reparameterize(model, *inputs)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(vars(model)[name] is value for name, value in parts.items())
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    for seed in (1, 2):  # the first call may change what the second one does
        torch.testing.assert_close(plain(image(seed=seed)), reference(image(seed=seed)))
    return plain, report


@pytest.mark.parametrize("kernel", [composed, loop_over_channels])
def test_data_that_a_forward_assigns_is_a_constant(kernel):
    def forward(self, x):
        self.kernel = kernel(self)
        self.conv.weight.data = self.kernel
        return F.relu(self.bn(self.conv(x)))

    model = of_conv(forward, kernel=None)
    with torch.no_grad():
        model.conv.weight.zero_()  # only the first call fills it
    plain, report = check_untouched(model)
    assert len(report.folded) == 1
    assert {name: tuple(p.shape) for name, p in plain.named_parameters()} == {
        "merged_conv.weight": (4, 4, 3, 3),
        "merged_conv.bias": (4,),
    }


def local_name(self, x):
    weight = self.conv.weight
    weight.data = composed(self)
    return F.relu(self.bn(F.conv2d(x, weight, padding=1)))


def part_of_a_part(self, x):
    self.inner[0].weight.data = composed(self)
    return F.relu(self.inner(x))


def attribute_of_a_part(self, x):
    self.inner.kernel = composed(self)
    return self.inner(x)


def functional_call(self, x):
    return F.relu(self.bn(torch.func.functional_call(self.conv, {"weight": composed(self)}, (x,))))


def norm(self, x):
    self.bn.weight.data = self.bn.bias.data.abs() + 1
    return F.relu(self.bn(F.conv2d(x, composed(self), padding=1)))


@pytest.mark.parametrize("forward", [local_name, part_of_a_part, attribute_of_a_part, functional_call, norm])
def test_other_ways_to_give_a_part_its_kernel(forward):
    inner = nn.Sequential(conv(), nn.BatchNorm2d(4))
    if forward is attribute_of_a_part:
        inner = module(lambda self, x: F.relu(self.bn(F.conv2d(x, self.kernel, padding=1))), bn=nn.BatchNorm2d(4))
    model = of_conv(forward, inner=inner)
    plain, report = check_untouched(model, image())
    assert len(report.folded) == 1
    assert report.left == ()
    assert sum(p.numel() for p in plain.parameters()) == 4 * 4 * 9 + 4


def decays(self, x):
    self.conv.weight.data = self.conv.weight * 0.9
    return F.relu(self.bn(self.conv(x)))


def assigned_too_late(self, x):
    y = self.conv(x)
    self.conv.weight.data = composed(self)
    return F.relu(self.bn(y))


def of_the_input(self, x):
    self.conv.weight.data = composed(self) * x.mean()
    return F.relu(self.bn(self.conv(x)))


def of_an_activation(self, x):
    y = self.conv(x)
    y.data = y.data * 2
    return F.relu(self.bn(y))


def in_memory(self, x):
    self.conv.weight.data.mul_(0.5)
    return F.relu(self.bn(self.conv(x)))


def other_kernel_the_second_time(self, x):
    first, self.kernel = self.kernel is None, composed(self)
    return F.relu(self.bn(F.conv2d(x, self.kernel * (1 if first else 2), padding=1)))


def moving_average(self, x):
    self.mean = self.mean * 0.5 + composed(self)
    return F.relu(self.bn(F.conv2d(x, self.mean, padding=1)))


def new_parameter_too_late(self, x):
    y = self.conv(x)
    self.conv.weight = nn.Parameter(composed(self))
    return F.relu(self.bn(y))


def read_by_a_part_that_is_shared(self, x):
    self.conv.weight.data = composed(self)
    return F.relu(self.bn(self.conv(x))) + self.shared(x)


@pytest.mark.parametrize(
    "forward",
    [
        decays,
        assigned_too_late,
        of_the_input,
        of_an_activation,
        in_memory,
        other_kernel_the_second_time,
        moving_average,
        new_parameter_too_late,
        read_by_a_part_that_is_shared,
    ],
)
def test_what_depends_on_the_call_stays(forward):
    mean = torch.zeros(4, 4, 3, 3)
    model = of_conv(forward, kernel=None, mean=mean, shared=conv())
    model.shared.weight = model.conv.weight
    with pytest.warns(NothingFoldedWarning):
        _, report = check_untouched(model, image())
    assert [skipped.name for skipped in report.left] == ["bn"]


GENERATOR = torch.Generator()
DRAWS = {
    "a function": lambda weight: weight + 0.1 * torch.randn_like(weight),
    "dropout": lambda weight: F.dropout(weight, 0.5, True),
    "rrelu": lambda weight: F.rrelu(weight, 0.1, 0.9, True),
    "a generator": lambda weight: weight * torch.rand(1, generator=GENERATOR),
    "Python": lambda weight: weight * random.random(),
    "NumPy": lambda weight: weight * float(np.random.rand()),  # noqa: NPY002 - what old code bases call
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", DRAWS)
def test_kernels_that_are_drawn_at_random_stay(name, given):
    """No proof is needed to see it; nor does the conversion change what is drawn next."""

    def forward(self, x):
        return self.bn(F.conv2d(x, DRAWS[name](self.conv.weight), padding=1))

    model = trained(module(forward, conv=conv(), bn=nn.BatchNorm2d(4)))
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1:3]  # noqa: NPY002
    with pytest.warns(NothingFoldedWarning):
        plain, report = repvgg.reparameterize(model, image() if given else None, prove=False)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.testing.assert_array_equal(np.random.get_state()[1], states[2][0])  # noqa: NPY002
    assert report.folded == ()
    assert not torch.equal(plain(image()), plain(image()))


def test_random_numbers_of_one_module_close_no_other():
    def forward(self, x):
        return self.inner(x) if random.random() < 2 else x

    inner = trained(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()))
    model = module(forward, inner=inner).eval()
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1
    assert_same_outputs(model, plain, image())
