"""A walk in tables: what a model holds, computes and moves, by layer, by stage and in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from repvgg.errors import UsageError
from repvgg.measure.holding import weight_bytes
from repvgg.measure.places import stage_of, stages_of
from repvgg.measure.walk import Op, walk

TILES = (2, 4)


@dataclass(frozen=True)
class Row:
    """What one part of a model holds, and what it does in one forward, for the whole batch.

    Attributes:
        name: path of a layer or a stage; "" for what the model does outside of them, and for the total.
        kind: class of the module of that name.
        params: values in its parameters; shared ones count where they are met first, buffers not at all.
        ops: how many are executed in it; 0 for a part that no forward in eval mode reaches.
        macs: multiply-adds of convolutions and matrix products, which the paper prints as FLOPs (§2.4).
        winograd_muls: multiplications if a Winograd algorithm is used wherever it can be.
        bytes_read: of inputs and weights, by each op on its own; see :mod:`repvgg.measure.traffic`.
        bytes_written: of outputs.
        peak_bytes: most bytes of activations that are held while one of its ops runs, images included and parameters
            left out, wherever they were made.
        unknown: names of the ops whose products nobody knows: if there are any, ``macs`` and ``winograd_muls`` are
            lower bounds.
        unknown_traffic: the same for the bytes that are read and written.
    """

    name: str
    kind: str
    params: int
    ops: int
    macs: int
    winograd_muls: int
    bytes_read: int
    bytes_written: int
    peak_bytes: int
    unknown: tuple[str, ...] = ()
    unknown_traffic: tuple[str, ...] = ()

    @property
    def bytes_moved(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float | None:
        """Arithmetic intensity: multiply-adds for each byte that is moved; None where one of them is not known.

        A multiply-add is two floating point operations: twice this is what a roofline in FLOPs per byte asks for.
        """
        known = self.bytes_moved and not self.unknown and not self.unknown_traffic
        return self.macs / self.bytes_moved if known else None

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        lists = {"unknown": list(self.unknown), "unknown_traffic": list(self.unknown_traffic)}
        return {**asdict(self), "bytes_moved": self.bytes_moved, "macs_per_byte": self.intensity, **lists}


@dataclass(frozen=True)
class Profile:
    """One walk, as three tables whose rows sum up to the same, but for peaks, of which the total has the highest.

    Attributes:
        layers: a row for each module that executes ops of its own or has parameters of its own, in the order of
            execution; those that were not reached come last.
        stages: the same by stage; see :func:`repvgg.measure.places.stages_of`.
        total: all of it.
        weight_bytes: memory of parameters and buffers.
        tile: of the Winograd algorithm that was counted, F(tile x tile, 3x3).
    """

    layers: tuple[Row, ...]
    stages: tuple[Row, ...]
    total: Row
    weight_bytes: int
    tile: int

    def rows(self, per: Literal["layer", "stage", "total"]) -> tuple[Row, ...]:
        """The table of that name."""
        return {"layer": self.layers, "stage": self.stages, "total": (self.total,)}[per]


def profile(model: nn.Module, inputs: Tensor | Sequence[Tensor], *, tile: int = 2) -> Profile:
    """Run ``model`` once in eval mode and say what each part of it costs.

    Args:
        model: any module; it is not changed. On the meta device nothing is computed and no memory is used.
        inputs: its argument, or its arguments.
        tile: 2 or 4, the outputs of a tile in each direction: F(2x2, 3x3) multiplies 4/9 as often as a plain 3x3
            convolution of stride 1, F(4x4, 3x3) a quarter as often, for every size of image.

    Raises:
        UsageError: another tile, or inputs that are no tensors.

    Limits: see :func:`repvgg.measure.walk`.
    """
    if tile not in TILES:
        raise UsageError(f"Winograd's algorithm is counted for tiles of 2 or 4 outputs, not {tile}.")
    ops, params, stages = walk(model, inputs).ops, _own_parameters(model), stages_of(model)

    def table(key: Callable[[str], str]) -> tuple[Row, ...]:
        parts: dict[str, tuple[list[Op], list[int]]] = {}
        for op in ops:
            parts.setdefault(key(op.path), ([], []))[0].append(op)
        for path, number in params.items():
            parts.setdefault(key(path), ([], []))[1].append(number)
        return tuple(_row(name, model, *part, tile) for name, part in parts.items())

    layers, by_stage = table(lambda path: path), table(lambda path: stage_of(path, stages))
    return Profile(layers, by_stage, _row("", model, ops, params.values(), tile), weight_bytes(model), tile)


def _row(name: str, model: nn.Module, ops: Sequence[Op], params: Iterable[int], tile: int) -> Row:
    """What these ops and parameters sum up to."""
    moved = [op.traffic for op in ops if op.traffic]
    return Row(
        name=name,
        kind=type(model.get_submodule(name)).__name__,
        params=sum(params),
        ops=len(ops),
        macs=sum(op.macs for op in ops),
        winograd_muls=sum(op.muls(tile) for op in ops),
        bytes_read=sum(traffic.read for traffic in moved),
        bytes_written=sum(traffic.written for traffic in moved),
        peak_bytes=max((op.held for op in ops), default=0),
        unknown=tuple(sorted({op.name for op in ops if op.work is None})),
        unknown_traffic=tuple(sorted({op.name for op in ops if op.traffic is None})),
    )


def _own_parameters(model: nn.Module) -> Counter[str]:
    """Path of each module that holds parameters itself, and how many values."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # shared ones by their first name
        counts[name.rpartition(".")[0]] += parameter.numel()
    return counts
