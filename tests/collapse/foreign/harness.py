"""What a network of another code base is here, and how two conversions of it are compared."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

Inputs = tuple[Any, ...]  # positional arguments of the forward


@dataclass(frozen=True)
class Network:
    """A network of another code base.

    Attributes:
        name: unique, as the table shows it.
        make: creates it with random weights in eval mode, in float32.
        inputs: creates the positional arguments of its forward, in float64.
        convert: the conversion of its code base; it may change the model that it gets, and returns the result.
        conversion: what ``convert`` is.
        source: "PyPI NAME", or the repository or paper from which it is rebuilt.
        package: what must be installed.
        norms: batch norms that no conversion can fold.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    convert: Callable[[nn.Module], nn.Module]
    conversion: str
    source: str
    package: str | None = None
    norms: int = 0

    def model(self) -> nn.Module:
        """Return the network in float64 and eval mode, with batch norms as training leaves them."""
        torch.manual_seed(0)
        with default_dtype(torch.float32):  # as its authors create it
            model = self.make().eval()
        with default_dtype(torch.float64):
            return calibrated(model.double(), self.inputs())

    def converted(self, model: nn.Module) -> nn.Module:
        """Return the result of the code base's own conversion; the model is left untouched."""
        with default_dtype(torch.float64), torch.no_grad():
            return self.convert(copy.deepcopy(model))


@dataclass(frozen=True)
class Counts:
    """What is left in a model: batch norms, convolutions that a forward executes, parameters."""

    norms: int
    convolutions: int
    parameters: int

    def exceeding(self, other: Counts) -> list[str]:
        """Return what this model has more of."""
        names = [field.name for field in dataclasses.fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {mine:,} > {theirs:,}" for name, mine, theirs in pairs if mine > theirs]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the dtype of tensors that a forward creates without one, and restore it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def calibrated(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Give batch norms random factors and, with noise, the statistics of the inputs, so activations stay bounded."""
    generator = torch.Generator().manual_seed(0)
    norms = [part for part in model.modules() if is_norm(part)]
    for part in norms:
        if part.weight is not None:
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.2, generator=generator)
    learned = [part for part in norms if isinstance(part, _BatchNorm)]
    for part in learned:
        part.train().momentum = 1.0
    with torch.no_grad():
        model(*inputs)
    for part in learned:
        part.eval().momentum = 0.1
    for part in norms:  # noise in units of the deviation, or it would be amplified from layer to layer
        noise = torch.randn(part.running_mean.shape, generator=generator) * 0.05
        part.running_mean.add_(noise * part.running_var.sqrt())
        part.running_var.mul_(torch.rand(part.running_var.shape, generator=generator) * 0.2 + 0.9)
    return model


def is_norm(part: nn.Module) -> bool:
    """Whether a module is a batch norm of any class, such as FrozenBatchNorm2d."""
    named = any("BatchNorm" in kind.__name__ for kind in type(part).__mro__)
    return named and isinstance(getattr(part, "running_var", None), Tensor)


class _Executed(TorchDispatchMode):
    """Counts the convolutions and the batch norms with running statistics that a forward executes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.convolutions += "convolution" in name
        # An instance norm runs as a batch norm with training=True.
        self.norms += name == "_native_batch_norm_legit_no_training" or (name == "native_batch_norm" and not args[5])
        return func(*args, **(kwargs or {}))


def count(model: nn.Module, inputs: Inputs) -> Counts:
    """Count batch norms (modules, or executed ones if those are more), executed convolutions, and parameters."""
    with default_dtype(torch.float64), torch.no_grad(), _Executed() as executed:
        model(*inputs)
    modules = sum(map(is_norm, model.modules()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counts(max(modules, executed.norms), executed.convolutions, parameters)


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a model; return the tensors of its result, whatever its structure."""
    with default_dtype(torch.float64), torch.no_grad():
        return list(_tensors(model(*copy.deepcopy(inputs))))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _tensors(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest over all tensors of max |found - expected| / max |expected|; inf if they do not correspond.

    Integers (labels, indices) must be equal.
    """
    if [(y.shape, y.dtype) for y in found] != [(y.shape, y.dtype) for y in expected]:
        return float("inf")
    return max((_tensor_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _tensor_error(found: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite() if expected.is_floating_point() else torch.zeros_like(expected, dtype=torch.bool)
    if not torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float((found[finite] - expected[finite]).abs().max())
    if difference != difference:
        return float("inf")
    return difference / max(float(expected[finite].abs().max()), 1e-300)


def deploy(model: nn.Module) -> nn.Module:
    """Call ``switch_to_deploy`` of every module that has it, the outermost first, as most repositories do."""
    for part in list(model.modules()):
        if hasattr(part, "switch_to_deploy"):
            part.switch_to_deploy()
    return model


def image(*shape: int, seed: int = 1) -> Tensor:
    """Return a seeded random tensor in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
