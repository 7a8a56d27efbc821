"""The description of a network as constants, in the layout of the structures of ``runtime/library.c``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from repvgg.engine.graph import FeatureShape, Floats
from repvgg.engine.kernels.base import Kernel
from repvgg.engine.planner.steps import Buffer, OutputBuffer, Plan, Step
from repvgg.engine.runtime.memory import ALIGNMENT, FLOAT_BYTES, round_up
from repvgg.errors import UnsupportedError

MAX_RANK, VERSION_BYTES, ID_BYTES, WEIGHTS_HEADER = 8, 128, 32, 64
INPUT = 2**64 - 1  # a source
WEIGHTS, ARENA, INPUT_STRIDES = 0, 1, 2  # where the weights of a step are


def _words(*fields: str | tuple[str, int]) -> np.dtype[np.void]:
    """Return the dtype of a structure of uint64 and arrays of them."""
    return np.dtype([(one, np.uint64) if isinstance(one, str) else (one[0], np.uint64, (one[1],)) for one in fields])


INPUT_TABLE = _words(("shape", 3))
OUTPUT_TABLE = _words(*("rank", ("shape", MAX_RANK), "offset", "image_stride", ("extents", 3), ("strides", 3)))
STEP_TABLE = _words(
    *("kernel", "source", "target", "weights_kind", "weights", "bias", "units_per_block"),
    *("items_per_block", "items_per_image", "first_image", "max_images", "input"),
)
_NUMBERS = (
    *("weights_bytes", "embedded", "level", "threads", "max_images", "arena_bytes"),
    *("num_inputs", "num_outputs", "num_steps", "inputs", "outputs", "steps"),
)
DESCRIPTION = np.dtype(
    [
        ("version", np.uint8, (VERSION_BYTES,)),
        ("weights_id", np.uint8, (ID_BYTES,)),
        *[(name, np.uint64) for name in _NUMBERS],
    ]
)


@final
@dataclass(frozen=True, eq=False)
class NetworkData:
    """The constants of a library.

    Attributes:
        description: the bytes of ``struct description`` and its tables.
        weights: bytes to write one after the other.
        weights_id: SHA-256 of them.
    """

    description: bytes
    weights: Sequence[memoryview]
    weights_id: bytes

    @property
    def weights_bytes(self) -> int:
        return sum(one.nbytes for one in self.weights)


def describe_network(
    plan: Plan, kernels: dict[Kernel, int], *, version: str, level: int, threads: int, embedded: bool
) -> NetworkData:
    """Describe a plan.

    Args:
        plan: with its weights.
        kernels: the index of each kernel in the table of functions.
        version: what ``model_version`` returns, at most 127 bytes.
        level: see :class:`repvgg.engine.library.targets.CpuTarget`.
        threads: by default.
        embedded: whether the library contains the weights.

    Raises:
        UnsupportedError: an output has more than 9 axes, or its first one does not count the images.
    """
    batch = plan.input_shapes[0][0]
    weights = _Weights()
    inputs = np.zeros(len(plan.input_shapes), INPUT_TABLE)
    inputs["shape"] = [shape[1:] for shape in plan.input_shapes]
    outputs = np.array([_output(one) for one in plan.outputs], OUTPUT_TABLE)
    steps = np.array([_step(step, kernels, weights, batch) for step in plan.steps], STEP_TABLE)
    head = np.zeros((), DESCRIPTION)
    digest = weights.digest()
    text = version.encode()[: VERSION_BYTES - 1]
    head["version"][: len(text)] = np.frombuffer(text, np.uint8)
    head["weights_id"] = np.frombuffer(digest, np.uint8)
    head["weights_bytes"], head["embedded"], head["level"] = weights.size, embedded, level
    head["threads"], head["max_images"] = threads, batch
    head["arena_bytes"] = FLOAT_BYTES * plan.memory_floats
    content = b""
    for name, table in (("inputs", inputs), ("outputs", outputs), ("steps", steps)):
        head[f"num_{name}"], head[name] = len(table), DESCRIPTION.itemsize + len(content)
        content += table.tobytes()
    return NetworkData(head.tobytes() + content, weights.arrays, digest)


class _Weights:
    """Packed weights and biases, each at a cache line; equal ones are stored once."""

    def __init__(self) -> None:
        self.arrays: list[memoryview] = []
        self.size = 0
        self._offsets: dict[int, int] = {}  # by id(): the steps of all chunks of a batch share their weights
        self._equal: dict[bytes, int] = {}

    def offset(self, values: Floats) -> int:
        """Return the offset of an array in bytes."""
        if id(values) not in self._offsets:
            contiguous = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
            key = hashlib.sha256(contiguous).digest()
            if key not in self._equal:
                self._equal[key] = self.size
                self.arrays += [contiguous, memoryview(b"\0" * (-contiguous.nbytes % ALIGNMENT))]
                self.size += round_up(contiguous.nbytes, ALIGNMENT)
            self._offsets[id(values)] = self._equal[key]
        return self._offsets[id(values)]

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for one in self.arrays:
            digest.update(one)
        return digest.digest()


def _output(output: OutputBuffer) -> tuple[Any, ...]:
    layout, tensor = output.buffer.layout, output.tensor
    if tensor.batch_axis or tensor.folded:
        raise UnsupportedError("A library returns tensors whose first axis counts the images: move the axis there.")
    shape = tensor.shape_of(FeatureShape(layout.channels, layout.size))
    if len(shape) > MAX_RANK:
        raise UnsupportedError(f"A library returns tensors of at most {MAX_RANK + 1} axes, not {len(shape) + 1}.")
    extents = layout.channels, *layout.size
    strides = layout.channel_stride, layout.row_stride, layout.pixel_stride
    order = [axis for group in tensor.axes for axis in group]  # the others have one element
    missing = 3 - len(order)
    return (
        *(len(shape), (*shape, *[0] * (MAX_RANK - len(shape)))),
        *(output.buffer.offset + layout.interior_offset, layout.image_stride),
        (*[1] * missing, *[extents[axis] for axis in order]),
        (*[0] * missing, *[strides[axis] for axis in order]),
    )


def _byte_offset(step: Step, buffer: Buffer) -> int:
    """Return where a step begins in a buffer, from the beginning of the arena."""
    return FLOAT_BYTES * (buffer.offset + step.offset_in(buffer))


def _step(step: Step, kernels: dict[Kernel, int], weights: _Weights, batch: int) -> tuple[int, ...]:
    if step.source is None:
        kind, offset = INPUT_STRIDES, 0
    elif isinstance(step.weights, Buffer):
        kind, offset = ARENA, _byte_offset(step, step.weights)
    else:
        kind, offset = WEIGHTS, weights.offset(step.weights)
    return (
        kernels[step.kernel],
        INPUT if step.source is None else _byte_offset(step, step.source),
        *(_byte_offset(step, step.target), kind, offset, weights.offset(step.bias)),
        *(step.kernel.units_per_block, step.items_per_block, step.items_per_image, step.first_image),
        batch if step.max_images is None else step.max_images,
        step.input,
    )
