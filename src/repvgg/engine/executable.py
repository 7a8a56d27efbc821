"""A network made for images of one size: its code, buffers and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from repvgg.engine.codegen.disk_cache import cached_object_code
from repvgg.engine.codegen.ir_builder import Function, module
from repvgg.engine.codegen.jit import Code
from repvgg.engine.graph import Floats, Layer
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.planner.algorithms import Machine
from repvgg.engine.planner.plan import BY_TABLE, NOTHING, Buffer, Plan, Step, Ways, plan
from repvgg.engine.runtime import thread_pool
from repvgg.engine.runtime.memory import Arena, Input

Shape: TypeAlias = tuple[int, int, int, int]


@final
class Runner:
    """The code of a network for images of one size, and the memory that it works in.

    Args:
        layers: see :func:`repvgg.engine.frontend.read`.
        shape: the largest batch, channels, height and width.
        machine: what computes.
        others: the same network for other sizes; weights that are packed alike are held once.
        ways: how the plan decides.

    Attributes:
        shape: as given.
        plan: the kernels and buffers, without the weights.
        rows: addresses of what :meth:`repvgg.engine.runtime.thread_pool.ThreadPool.run` takes, a row for each step.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        shape: Shape,
        machine: Machine,
        others: Sequence[Runner] = (),
        ways: Ways = BY_TABLE,
    ) -> None:
        whole, isa = plan(layers, shape, machine, ways), machine.isa
        names, functions = _functions(whole)
        self.shape = shape
        self._code = Code([cached_object_code(module(functions), isa)], isa)
        strides = np.zeros(4, np.int64)
        self._arena = Arena()
        self._memory = [self._arena.zeros(buffer.floats) for buffer in whole.buffers]
        self._weights: list[Floats] = [values for other in others for values in other._weights]
        table, self._weights = self._filled_table(whole, names)
        loads = [number for number, step in enumerate(whole.steps) if step.source is None]
        table["weights"][loads] = strides.ctypes.data
        self._loads = [(number, whole.steps[number].first) for number in loads]
        self.rows = range(table.ctypes.data, table.ctypes.data + table.nbytes, table.strides[0])
        self._sources, self._strides = table["source"], strides.data
        self.plan = _without_weights(whole)

    def take(self, x: Input) -> None:
        """Have the first step read from ``x``."""
        for axis, stride in enumerate(x.strides):
            self._strides[axis] = stride
        for place, first in self._loads:
            self._sources[place] = x.address + 4 * first * x.strides[0]

    def output(self, count: int) -> Floats:
        """A copy of what came of ``count`` images: (n, O) behind a pool, and else (n, O, H, W)."""
        buffer = self.plan.output
        images, numbers = buffer.images, self._memory[buffer.number]
        if self.plan.flat:
            return numbers.reshape(-1, images.pitch)[:count, : images.channels].copy()
        maps = numbers.reshape(buffer.count, *images.size, images.pitch)[:count, :, :, : images.channels]
        return maps.transpose(0, 3, 1, 2).copy()

    def _filled_table(self, whole: Plan, names: dict[Kernel, str]) -> tuple[NDArray[np.void], list[Floats]]:
        """The table of steps, and the packed weights that it points to."""
        table = thread_pool.step_table(len(whole.steps))[:-1]
        held: dict[int, Floats] = {}  # of steps that come again for each part of a batch, too
        for row, step in zip(table, whole.steps, strict=True):
            source, target = self._address(step.source, step), self._address(step.target, step)
            for values in (step.weights, step.bias):
                if not isinstance(values, Buffer) and id(values) not in held:
                    held[id(values)] = self._held(values)
            weights, bias = step.weights, held[id(step.bias)]
            at = self._address(weights, step) if isinstance(weights, Buffer) else held[id(weights)].ctypes.data
            code = self._code.address(names[step.kernel])
            row["function"], row["source"], row["target"] = code, source, target
            row["weights"], row["bias"] = at, bias.ctypes.data
            row["units_per_block"], row["items_per_block"] = step.kernel.units_of_image, step.block
            row["items_per_image"], row["first_image"] = step.parts, step.first
            row["max_images"] = self.shape[0] if step.limit is None else step.limit
        return table, list(held.values())

    def _held(self, values: Floats) -> Floats:
        """An aligned copy, or one that is there already."""
        same = (one for one in self._weights if one.size == values.size and np.array_equal(one, values))
        found = next(same, None)
        return self._arena.aligned(values) if found is None else found

    def _address(self, buffer: Buffer | None, step: Step) -> int:
        """Of the first image that a step reads or writes; buffers that hold a part of the batch hold the step's."""
        if buffer is None:
            return 0
        ahead = step.first if step.limit is not None and buffer.count > step.limit else 0
        return self._memory[buffer.number].ctypes.data + 4 * ahead * buffer.images.image


def _functions(plan: Plan) -> tuple[dict[Kernel, str], list[Function]]:
    """A name for each different kernel, and all functions of the network."""
    names: dict[Kernel, str] = {}
    for step in plan.steps:
        names.setdefault(step.kernel, f"kernel{len(names)}")
    written = [function for kernel, name in names.items() for function in kernel.functions(name)]
    return names, written


def _without_weights(whole: Plan) -> Plan:
    """The same, so that the packed weights are not held twice."""
    return replace(whole, steps=tuple(replace(step, weights=NOTHING, bias=NOTHING) for step in whole.steps))
