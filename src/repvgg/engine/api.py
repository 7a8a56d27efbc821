"""``repvgg.engine.compile``: machine code for a plain network, or PyTorch where the engine does not support it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, final, overload

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.graph import Floats, Shape
from repvgg.engine.planner.algorithms import ERROR_GROWTH_LIMITS, Precision
from repvgg.engine.runtime.memory import Images, view_input
from repvgg.engine.runtime.thread_pool import check_threads
from repvgg.errors import FallbackWarning, RepvggError, UsageError, first_line


@final
class TorchFallback:
    """A model that PyTorch runs in place of the engine, with the same inputs and outputs, in eval mode.

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
    def __call__(self, x: Images) -> Images:
        """See :meth:`repvgg.engine.CompiledModel.__call__`."""
        view_input(x, self._channels)
        images = x if isinstance(x, Tensor) else torch.from_numpy(x.copy())
        with torch.no_grad(), eval_mode(self.model):
            output: Tensor = self.model(images)
        return output if isinstance(x, Tensor) else output.numpy()


InTorch = TorchFallback  #: Alias for code written for the old name.


@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: Literal[False] = False,
) -> CompiledModel: ...
@overload
def compile(  # noqa: A001
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool,
) -> CompiledModel | TorchFallback: ...
def compile(  # noqa: A001 - as torch.compile
    model: nn.Module,
    input_shape: Sequence[int],
    threads: int | None = None,
    *,
    precision: Precision = "high",
    search: bool = False,
    fallback: bool = False,
) -> CompiledModel | TorchFallback:
    """Compile a plain network for this processor.

    Call the result from threads with a stack of 2 MiB or more, as every thread has on Linux unless
    :func:`threading.stack_size` says otherwise. Winograd weights take 1.3 to 10 times the memory of the model's
    weights, most for large batches of small images.

    Args:
        model: convolutions, ReLUs, squeeze-and-excitation gates, a global average pool and linear layers in a chain,
            float32 on the CPU. It runs as in eval mode. Its weights are copied: later changes have no effect.
        input_shape: (N, C, H, W), the most frequent input. Smaller batches run as well; other sizes are compiled for
            on first use.
        threads: that work on each call, the caller among them. Default: ``torch.get_num_threads()``, at most one for
            each processor of this process.
        precision: the error budget. "highest" uses direct convolutions only. "high" uses the Winograd tiles whose RMS
            error in a layer is below 4x that of OpenVINO's fp32 layers: up to F(4x4) anywhere, F(5x5) from 71 input
            channels, F(4x7) from 178, F(5x7) from 361. "medium" allows 9x: F(7x7) from 359 channels.
        search: measure the best few algorithms of each convolution for ``input_shape`` on this machine, and take the
            fastest. This takes some seconds for each kind of convolution, once: results are cached on disk. Otherwise
            a cost model selects the algorithms. The outputs of both differ by rounding errors.
        fallback: let PyTorch run the model, with a warning that gives the reason, if the engine cannot.

    Raises:
        UnsupportedError: the engine does not support a layer; the message names it.
        UsageError: ``input_shape``, ``threads`` or ``precision`` is invalid, or the engine has no code for this
            platform.
        MissingDependencyError: llvmlite is not installed.
    """
    shape = _checked_shape(input_shape)
    check_threads(threads)
    if precision not in ERROR_GROWTH_LIMITS:
        known = ", ".join(map(repr, ERROR_GROWTH_LIMITS))
        raise UsageError(f"precision must be one of {known}, not {precision!r}.")
    try:
        return CompiledModel(read(model), shape, host_isa(), threads, precision, search)
    except (RepvggError, RuntimeError) as error:  # LLVM raises RuntimeError
        if not fallback:
            raise
        warnings.warn(
            f"PyTorch runs {type(model).__name__}, because the engine cannot: {first_line(error)}.",
            FallbackWarning,
            stacklevel=2,
        )
        return TorchFallback(model, shape[1])


def _checked_shape(input_shape: Sequence[int]) -> Shape:
    shape: Any = tuple(input_shape)
    if len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape):
        raise UsageError(f"input_shape must be (N, C, H, W), four positive integers, not {shape}.")
    batch, channels, height, width = shape
    return batch, channels, height, width
