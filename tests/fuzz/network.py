"""The interpreter: a program as an ``nn.Module`` with real submodules and trained-looking weights and statistics."""

from functools import reduce
from operator import add, iadd, isub, sub

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from tests.fuzz.program import (
    Again,
    Block,
    Cat,
    Chain,
    Conv,
    Merge,
    Norm,
    Op,
    Pad,
    Pool,
    Program,
    Same,
    Scale,
    Slice,
    Step,
    Tied,
    Times,
    returned,
)

_SAME = {
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5),
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
}
_FUNCTIONS = {"f.relu": F.relu, "f.relu_": torch.relu_, "f.tanh": torch.tanh}
_MERGE = {"add": add, "sub": sub, "+=": iadd, "-=": isub}


class Factor(nn.Module):
    """A learned factor per channel, or one for all."""

    def __init__(self, channels: int):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, channels, 1, 1) if channels > 1 else torch.ones(()))

    def forward(self, x):
        return x * self.factor


class _Net(nn.Module):
    """Runs its program step by step; the modules of the steps are its submodules ``s0``, ``s1``, …"""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        for index, step in enumerate(program.steps):
            module = make(step.op)
            if module is not None:
                self.add_module(f"s{index}", module)
            if isinstance(step.op, Tied):
                getattr(self, f"s{index}").weight = getattr(self, f"s{step.op.step}").weight

    def run(self, *inputs):
        values = list(inputs)
        for index, step in enumerate(self.program.steps):
            out = self.call(index, step, [values[i] for i in step.reads])
            count = returned(self.program.steps[step.op.step].op if isinstance(step.op, Again) else step.op)
            values.extend([out] if count == 1 else [out[i] for i in range(count)])
        outputs = tuple(values[i] for i in self.program.outputs)
        if self.program.flat:
            return torch.cat([out.flatten(1) for out in outputs], 1)
        return outputs[0] if len(outputs) == 1 else outputs

    def call(self, index: int, step: Step, xs: list):
        op = step.op
        if isinstance(op, Again):
            return getattr(self, f"s{op.step}")(*xs)
        if hasattr(self, f"s{index}"):
            return getattr(self, f"s{index}")(*xs)
        return apply(op, xs)


class Net(_Net):
    """A program of one input."""

    def forward(self, x):
        return self.run(x)


class Net2(_Net):
    """A program of two inputs."""

    def forward(self, x, y):
        return self.run(x, y)


def apply(op: Op, xs: list):
    """An op without a module."""
    match op:
        case Slice(start, stop):
            return xs[0][:, start:stop]
        case Cat():
            return torch.cat(xs, 1)
        case Times(factor):
            return xs[0] * factor
        case Pad(sides):
            return F.pad(xs[0], sides)
        case Same(name):
            return _FUNCTIONS[name](xs[0])
        case Merge("nested"):
            return reduce(lambda right, left: left + right, reversed(xs))
        case Merge(how):
            return reduce(_MERGE[how], xs)
    raise AssertionError(op)


def make(op: Op) -> nn.Module | None:
    """Return the module of a step, or ``None`` if it calls a function or an earlier module."""
    match op:
        case Conv() as c:
            return nn.Conv2d(
                c.inputs, c.outputs, c.kernel, c.stride, c.padding, c.dilation, c.groups, c.bias, padding_mode=c.mode
            )
        case Tied(_, conv):
            return make(conv)
        case Norm(channels, "frozen"):
            return FrozenBatchNorm2d(channels)
        case Norm(channels, "sync", affine):
            return nn.SyncBatchNorm(channels, affine=affine)
        case Norm(channels, kind, affine):
            return nn.BatchNorm2d(channels, affine=affine, track_running_stats=kind != "untracked")
        case Scale(channels):
            return Factor(channels)
        case Pool(kernel, stride, padding, kind):
            return {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[kind](kernel, stride, padding)
        case Pad(sides, False):
            return nn.ZeroPad2d(sides)
        case Same(name) if name in _SAME:
            return _SAME[name]()
        case Chain(layers):
            return nn.Sequential(*(make(layer) for layer in layers))
        case Block(program):
            return (Net, Net2)[program.inputs - 1](program)
    return None


def network(program: Program) -> nn.Module:
    """Return a program's network: float64, eval mode, tensors drawn from one seed in the order of its submodules."""
    net = make(Block(program))
    generator = torch.Generator().manual_seed(0)
    for part in net.modules():
        if isinstance(part, (_BatchNorm, FrozenBatchNorm2d)) and part.running_mean is not None:
            part.running_mean.normal_(0, 0.5, generator=generator)
            part.running_var.uniform_(0.3, 2.5, generator=generator)
        if isinstance(part, (_BatchNorm, FrozenBatchNorm2d)) and part.weight is not None:
            part.weight.data.normal_(1, 0.4, generator=generator)
            part.bias.data.normal_(0, 0.4, generator=generator)
        if isinstance(part, nn.Conv2d):
            part.weight.data.normal_(0, part.weight[0].numel() ** -0.5, generator=generator)
            if part.bias is not None:
                part.bias.data.normal_(0, 0.4, generator=generator)
        if isinstance(part, Factor):
            part.factor.data.normal_(1, 0.4, generator=generator)
    return net.double().eval()


def image(channels: int, size: tuple[int, int], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).add(0.5)
