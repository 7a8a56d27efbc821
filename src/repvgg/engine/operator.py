"""``torch.ops.repvgg.compiled_model``: a compiled model as one operator in the graphs that PyTorch traces.

A compiled model reads the memory of its images, and while PyTorch traces there is none. So a traced call is a call of
this operator, with the name of the model: torch.compile, torch.export, make_fx and torch.jit.trace record it as one
node, whose output has the right shape for any number and size of images.

A graph holds the name of its model alone, and a name is unique to its process. So a model that was traced is kept until
the process ends, and a graph that was saved does not run in another process.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from repvgg.errors import UsageError


class Traceable(Protocol):
    """What the operator needs of a compiled model."""

    def __call__(self, *inputs: Any) -> Any: ...

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for images of this shape, (n, C, H, W)."""
        ...


_TRANSFORMS = "The engine does not support torch.func.vmap, grad and jvp: call the model outside of them."
_models: WeakValueDictionary[str, Traceable] = WeakValueDictionary()
_traced: dict[str, Traceable] = {}


def register(name: str, model: Traceable) -> None:
    """Let the operator call this model by a name that is unique in all processes."""
    _models[name] = model


def is_traced() -> bool:
    """Return whether PyTorch records the calls of this thread, or watches them as FakeTensorMode does."""
    return (
        torch.compiler.is_compiling()  # the first, because torch.compile itself evaluates this line
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def call_traced(x: Tensor, name: str) -> Tensor:
    """Call the operator.

    Raises:
        UsageError: inside of a transform of torch.func; a tangent would be zero without an error.
    """
    # torch.compile cannot trace the first question; there, the operator itself refuses vmap and grad.
    inside = not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
    if inside or torch.autograd.forward_ad._current_level >= 0:
        raise UsageError(_TRANSFORMS)
    out: Tensor = compiled_model(x, name)
    return out


@torch.library.custom_op("repvgg::compiled_model", mutates_args=())
def compiled_model(x: Tensor, name: str) -> Tensor:
    """Run the compiled model of that name.

    Raises:
        UsageError: no model of this process has the name; else as the model.
    """
    out: Tensor = _named(name)(x)
    return out


@compiled_model.register_fake
def _(x: Tensor, name: str) -> Tensor:
    model = _traced[name] = _named(name)
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        raise UsageError(f"This model takes float32 images on the CPU, got {x.dtype} on {x.device.type}.")
    return x.new_empty(model.output_shape(tuple(x.shape)))


def _refuse_gradient(context: Any, gradient: Tensor) -> None:
    raise UsageError(
        "The engine computes no gradients: call the model under torch.no_grad(), or train the network itself."
    )


compiled_model.register_autograd(_refuse_gradient)


@compiled_model.register_vmap
def _(*_: object) -> NoReturn:
    raise UsageError(_TRANSFORMS)


def _named(name: str) -> Traceable:
    model = _models.get(name)
    if model is None:
        raise UsageError(
            "This graph calls a model that another process compiled: compile it in this process, and trace it again."
        )
    return model
