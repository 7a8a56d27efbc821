"""From a model to what runs it: the engine, or PyTorch where that is allowed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, final, overload

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.compiled_model import Network
from repvgg.engine.executable import Shape
from repvgg.engine.frontend import read
from repvgg.engine.graph import Floats
from repvgg.engine.planner.algorithms import LOSSES, Precision
from repvgg.engine.runtime.memory import Given, read_input
from repvgg.engine.runtime.thread_pool import check_threads
from repvgg.errors import FallbackWarning, RepvggError, UsageError, first_line


@final
class InTorch:
    """A model that PyTorch runs in the engine's place, with the same inputs and outputs, in eval mode.

    Args:
        model: the model; it is not copied.
        channels: of the images.

    Attributes:
        model: as given.
    """

    def __init__(self, model: nn.Module, channels: int) -> None:
        self.model, self._channels = model, channels

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Floats) -> Floats: ...
    def __call__(self, x: Given) -> Given:
        """See :meth:`repvgg.engine.Network.__call__`."""
        read_input(x, self._channels)
        images = x if isinstance(x, Tensor) else torch.from_numpy(x.copy())
        with torch.no_grad(), eval_mode(self.model):
            output: Tensor = self.model(images)
        return output if isinstance(x, Tensor) else output.numpy()


@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: Literal[False] = False,
) -> Network: ...
@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool,
) -> Network | InTorch: ...
def compile(  # noqa: A001 - as torch.compile
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool = False,
) -> Network | InTorch:
    """Compile a plain network for the processor at hand.

    Whoever calls it should have a stack of two megabytes, as every thread has on Linux unless
    :func:`threading.stack_size` said otherwise. Winograd's weights take 1.3 to 10 times the memory of the model's, most
    for large batches of small images.

    Args:
        model: convolutions, ReLUs, squeeze-excite gates, a global average pool and linear layers in a chain, float32
            on the CPU. Its weights are copied: changes that come later have no effect. It is run as in eval mode.
        input_shape: (N, C, H, W), the images that come most; smaller batches run as well, and other sizes are
            compiled for when they come.
        threads: that work on each call, the caller among them; None takes as many as ``torch.get_num_threads()``
            says, and no more than the process may run on.
        precision: how far rounding errors may go. "high" takes those F(m x n) of Winograd whose error in a layer, root
            mean square, is below four times that of OpenVINO in float32: F(5x5) from 71 input channels, F(4x7) from
            178, F(5x7) from 361; and up to F(4x4) anywhere. "medium" allows nine times, F(7x7) from 359 channels;
            "highest" convolves directly alone.
        search: measure, on this machine, the best few of the ways to compute each convolution of ``input_shape``, and
            take the fastest; that takes some seconds for each kind of convolution, once: the answers are kept on the
            disk. Else a table of costs says which way to take. Results differ by roundings.
        fallback: have PyTorch run the model, with a warning that says why, if the engine cannot.

    Raises:
        UnsupportedError: the engine does not know a layer; the text names it. Nothing is compiled then.
        UsageError: no shape of four positive numbers, no positive number of threads, no such precision, or a platform
            that the engine makes no code for.
        MissingDependencyError: llvmlite or platformdirs is not installed.
    """
    shape = _shape(input_shape)
    check_threads(threads)
    if precision not in LOSSES:
        raise UsageError(f"precision is {', '.join(map(repr, LOSSES))}, not {precision!r}.")
    try:
        return Network(read(model), shape, host_isa(), threads, precision, search)
    except (RepvggError, RuntimeError) as error:  # the latter by LLVM
        if not fallback:
            raise
        text = f"PyTorch runs {type(model).__name__} in the engine's place: {first_line(error)}."
        warnings.warn(text, FallbackWarning, stacklevel=2)
        return InTorch(model, shape[1])


def _shape(given: Sequence[int]) -> Shape:
    shape: Any = tuple(given)
    if len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape):
        raise UsageError(f"An input_shape is (N, C, H, W), four positive numbers, not {tuple(given)}.")
    batch, channels, height, width = shape
    return batch, channels, height, width
