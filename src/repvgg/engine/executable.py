"""The executable form of a plan: machine code, buffers, packed weights, and a step table for the thread pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from repvgg.engine.codegen.disk_cache import cached_object_code
from repvgg.engine.codegen.ir_builder import IRBuilder, build_module
from repvgg.engine.codegen.jit import MachineCode
from repvgg.engine.graph import FeatureShape, Floats, Shape
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.planner.steps import NO_WEIGHTS, Buffer, OutputBuffer, Plan, Step
from repvgg.engine.runtime import thread_pool
from repvgg.engine.runtime.memory import FLOAT_BYTES, Arena, InputView


@final
class Executable:
    """The code of a plan, and the memory that it works in.

    Args:
        plan: what to compile.
        others: executables of the same network for other input sizes; identical packed weights are shared with them.

    Attributes:
        shapes: the largest inputs (N, C, H, W).
        batch: their N.
        plan: as given, without the packed weights.
        step_addresses: of the rows of the step table, for :meth:`repvgg.engine.runtime.thread_pool.ThreadPool.run`.
    """

    def __init__(self, plan: Plan, others: Sequence[Executable] = ()) -> None:
        names, functions = kernel_functions(plan)
        self.shapes: tuple[Shape, ...] = plan.input_shapes
        self.batch = self.shapes[0][0]
        self._code = MachineCode([cached_object_code(build_module(functions), plan.isa)], plan.isa)
        self._arena = Arena()
        self._memory = allocate(plan, self._arena)
        table, weights = self._fill_table(plan, names, [one for other in others for one in other._weights])
        self._weights: list[Floats] = weights
        strides = np.zeros((len(plan.input_shapes), 4), np.int64)
        loads = [number for number, step in enumerate(plan.steps) if step.source is None]
        self._loads = [(number, plan.steps[number].first_image, plan.steps[number].input) for number in loads]
        for number, _, which in self._loads:  # the reorder kernel reads the strides of its input from there
            table["weights"][number] = strides[which:].ctypes.data
        self.step_addresses = range(table.ctypes.data, table.ctypes.data + table.nbytes, table.strides[0])
        self._sources, self._strides = table["source"], strides
        # The plan's weights are dropped: the arena has aligned copies of them.
        steps = tuple(replace(step, weights=NO_WEIGHTS, bias=NO_WEIGHTS) for step in plan.steps)
        self.plan = replace(plan, steps=steps)

    def set_inputs(self, inputs: Sequence[InputView]) -> None:
        """Let the first steps read from ``inputs``, which must stay alive until the steps have run."""
        for which, x in enumerate(inputs):
            for axis, stride in enumerate(x.strides):
                self._strides[which, axis] = stride
        for number, first_image, which in self._loads:
            x = inputs[which]
            self._sources[number] = x.address + FLOAT_BYTES * first_image * x.strides[0]

    def outputs(self, count: int) -> list[Floats]:
        """Copy the outputs for ``count`` images."""
        return [self._output(one, count) for one in self.plan.outputs]

    def _output(self, output: OutputBuffer, count: int) -> Floats:
        layout, values = output.buffer.layout, self._memory[output.buffer.number]
        (height, width), (above, left) = layout.size, layout.border
        maps = values.reshape(-1, layout.image_stride)[:count]
        maps = maps[:, : layout.plane_size].reshape(
            count, -1, layout.row_stride // layout.pixel_stride, layout.pixel_stride
        )
        maps = maps[:, above : above + height, left : left + width, : layout.channels].transpose(0, 3, 1, 2)
        order = [1 + axis for group in output.tensor.axes for axis in group]
        # Axes that are not mentioned have one element.
        arranged = np.array(maps.transpose(0, *order, *(axis for axis in (1, 2, 3) if axis not in order)), order="C")
        shape, tensor = FeatureShape(layout.channels, layout.size), output.tensor
        found = np.moveaxis(arranged.reshape(count, *tensor.shape_of(shape)), 0, tensor.batch_axis)
        return np.ascontiguousarray(found).reshape(tensor.tensor_shape(count, shape))

    def _fill_table(
        self, plan: Plan, names: dict[Kernel, str], others: Sequence[Floats]
    ) -> tuple[NDArray[np.void], list[Floats]]:
        """Return the step table and the packed weights that it points to, some of them equal ones of ``others``."""
        table = thread_pool.step_table(len(plan.steps))[:-1]
        packed: dict[int, Floats] = {}  # by id(): the steps of all chunks of a batch share their weights
        for row, step in zip(table, plan.steps, strict=True):
            for values in (step.weights, step.bias):
                if not isinstance(values, Buffer) and id(values) not in packed:
                    equal = (one for one in others if one.size == values.size and np.array_equal(one, values))
                    found = next(equal, None)
                    packed[id(values)] = self._arena.aligned_copy(values) if found is None else found
            if isinstance(step.weights, Buffer):
                row["weights"] = self._address(step.weights, step)
            else:
                row["weights"] = packed[id(step.weights)].ctypes.data
            row["bias"] = packed[id(step.bias)].ctypes.data
            row["function"] = self._code.address(names[step.kernel])
            row["source"] = 0 if step.source is None else self._address(step.source, step)
            row["target"] = self._address(step.target, step)
            row["units_per_block"] = step.kernel.units_per_block
            row["items_per_block"], row["items_per_image"] = step.items_per_block, step.items_per_image
            row["first_image"] = step.first_image
            row["max_images"] = self.batch if step.max_images is None else step.max_images
        return table, list(packed.values())

    def _address(self, buffer: Buffer, step: Step) -> int:
        """Return the address of the first image that a step reads or writes."""
        return self._memory[buffer.number].ctypes.data + FLOAT_BYTES * step.offset_in(buffer)


def allocate(plan: Plan, arena: Arena) -> list[Floats]:
    """Return the memory of each buffer of a plan; that of buffers of other lifetimes overlaps."""
    whole = arena.zeros(plan.memory_floats)
    return [whole[buffer.offset : buffer.offset + buffer.floats] for buffer in plan.buffers]


def kernel_functions(plan: Plan) -> tuple[dict[Kernel, str], list[IRBuilder]]:
    """Generate the IR of each distinct kernel; return the name of each kernel, and all functions."""
    names: dict[Kernel, str] = {}
    for step in plan.steps:
        names.setdefault(step.kernel, f"kernel{len(names)}")
    functions = [function for kernel, name in names.items() for function in kernel.emit(name)]
    return names, functions
