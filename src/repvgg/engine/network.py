"""A plain network, ready to be run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from repvgg.engine.choice import Machine
from repvgg.engine.ir import Function, module
from repvgg.engine.isa import Isa, host_isa
from repvgg.engine.jit import Code, object_code
from repvgg.engine.kernels.kernel import Kernel
from repvgg.engine.layers import Floats, Layer
from repvgg.engine.memory import aligned, zeros
from repvgg.engine.plan import Buffer, Plan, plan
from repvgg.engine.program import WORDS, runtime
from repvgg.engine.reader import read
from repvgg.engine.workers import Workers, thread_count
from repvgg.errors import UsageError

Shape = tuple[int, int, int, int]
_SOURCE = 1  # places in a row of the table of steps
_WEIGHTS = 3


@final
@dataclass(frozen=True)
class StepTime:
    """How long one step of a network takes.

    Attributes:
        name: of the layer.
        kernel: what computes it, with its tiles.
        seconds: the median.
        muls: multiplications on the whole batch, those of tiles that stick out among them; 0 where none count.
    """

    name: str
    kernel: Kernel
    seconds: float
    muls: int

    @property
    def gflops(self) -> float:
        """Billions of multiplications and additions a second, two for each multiplication that is really done."""
        return 2e-9 * self.muls / self.seconds


@final
class Network:
    """A compiled network: ``logits = network(images)``.

    Args:
        layers: see :func:`repvgg.engine.reader.read`.
        input_shape: the largest batch, channels, height and width.
        isa: the vectors to use.
        threads: that work on each call, the caller among them.

    Attributes:
        input_shape: as given.
        threads: as given.
        plan: the kernels and buffers.
    """

    def __init__(self, layers: Sequence[Layer], input_shape: Shape, isa: Isa, threads: int = 1) -> None:
        self.input_shape, self.threads = input_shape, threads
        self.plan = plan(layers, input_shape, Machine(isa, threads))
        names, functions = _functions(self.plan)
        self._code = Code([object_code(module(functions) + runtime(isa), isa)], isa)
        self._strides = np.zeros(4, np.int64)
        self._memory = [zeros(buffer.floats) for buffer in self.plan.buffers]
        self._table, self._weights = self._filled_table(names)
        self._workers = Workers(self._code, self._table, threads)
        self._lock = Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the network on float32 images (n, C, H, W), with n up to the batch it was made for.

        Images of any strides are read as they lie, channels_last among them. The output is a new tensor: (n, O)
        behind a pool, and else (n, O, H, W).

        Raises:
            UsageError: the images have another shape, dtype or device, or another thread is inside.
        """
        with self._entered(x) as batch:
            self._workers.run(batch)
            return self._output(batch)

    def profile(self, x: Tensor, repeats: int = 20) -> tuple[StepTime, ...]:
        """How long each step takes inside of a run on ``x``: the median of ``repeats`` runs, step by step.

        See :meth:`__call__` for the errors.
        """
        seconds = np.zeros((repeats, len(self.plan.steps)))
        with self._entered(x) as batch:
            for times in seconds:
                for number in range(len(times)):
                    start = time.perf_counter()
                    self._workers.run(batch, slice(number, number + 1))
                    times[number] = time.perf_counter() - start
        pairs = zip(self.plan.steps, np.median(seconds, axis=0), strict=True)
        return tuple(StepTime(step.name, step.kernel, float(median), step.muls(len(x))) for step, median in pairs)

    @contextmanager
    def _entered(self, x: Tensor) -> Iterator[int]:
        """The batch of a checked input that the first step reads; nobody else is inside."""
        self._check(x)
        if not self._lock.acquire(blocking=False):
            raise UsageError("This network is running in another thread: compile one for each thread.")
        try:
            self._strides[:] = x.stride()
            self._table[0, _SOURCE] = x.data_ptr()
            yield len(x)
        finally:
            self._lock.release()

    def _check(self, x: Tensor) -> None:
        most, *rest = self.input_shape
        fits = x.ndim == 4 and list(x.shape[1:]) == rest and 0 < len(x) <= most
        if not fits or x.dtype != torch.float32 or x.device.type != "cpu":
            shape = ", ".join(map(str, rest))
            raise UsageError(
                f"This network takes torch.float32 of shape (1…{most}, {shape}) on the CPU, "
                f"not {x.dtype} of shape {tuple(x.shape)} on {x.device.type}."
            )

    def _output(self, count: int) -> Tensor:
        buffer = self.plan.output
        images, numbers = buffer.images, self._memory[buffer.number]
        if self.plan.flat:
            return torch.from_numpy(numbers.reshape(-1, images.pitch)[:count, : images.channels].copy())
        maps = numbers.reshape(buffer.count, *images.size, images.pitch)[:count, :, :, : images.channels]
        return torch.from_numpy(np.ascontiguousarray(maps.transpose(0, 3, 1, 2)))

    def _filled_table(self, names: dict[Kernel, str]) -> tuple[NDArray[np.int64], list[Floats]]:
        """The table of steps, and the packed weights that it points to."""
        table, kept = zeros(2 * WORDS * len(self.plan.steps)).view(np.int64).reshape(-1, WORDS), []
        for row, step in zip(table, self.plan.steps, strict=True):
            source, target = self._address(step.source), self._address(step.target)
            weights = step.weights if isinstance(step.weights, Buffer) else aligned(step.weights)
            bias = aligned(step.bias)
            kept += [bias] if isinstance(weights, Buffer) else [weights, bias]
            at = self._address(weights) if isinstance(weights, Buffer) else weights.ctypes.data
            code = self._code.address(names[step.kernel])
            row[:7] = (code, source, target, at, bias.ctypes.data, step.kernel.units_of_image, step.block)
        table[0, _WEIGHTS] = self._strides.ctypes.data
        return table, kept

    def _address(self, buffer: Buffer | None) -> int:
        return self._memory[buffer.number].ctypes.data if buffer else 0


def _functions(plan: Plan) -> tuple[dict[Kernel, str], list[Function]]:
    """A name for each different kernel, and all functions of the network."""
    names: dict[Kernel, str] = {}
    for step in plan.steps:
        names.setdefault(step.kernel, f"kernel{len(names)}")
    written = [function for kernel, name in names.items() for function in kernel.functions(name)]
    return names, written


def compile(model: nn.Module, input_shape: Sequence[int], threads: int | None = None) -> Network:  # noqa: A001 - as torch.compile
    """Compile a plain network for the processor at hand.

    Args:
        model: convolutions, ReLUs, squeeze-excite gates, a global average pool and linear layers in a chain, float32
            on the CPU. Its weights are copied: changes that come later have no effect. It is run as in eval mode.
        input_shape: (N, C, H, W); smaller batches run as well.
        threads: that work on each call, the caller among them; None takes as many as ``torch.get_num_threads()``
            says, and no more than the process may run on.

    Raises:
        UnsupportedError: the engine does not know a layer; the text names it. Nothing is compiled then.
        UsageError: no shape of four positive numbers, no positive number of threads, or a processor or platform that
            the engine makes no code for.
        MissingDependencyError: llvmlite is not installed.
    """
    shape = tuple(input_shape)
    if len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape):
        raise UsageError(f"An input_shape is (N, C, H, W), four positive numbers, not {tuple(input_shape)}.")
    batch, channels, height, width = shape
    count = thread_count(threads)
    return Network(read(model), (batch, channels, height, width), host_isa(), count)
