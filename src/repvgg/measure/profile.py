"""Tables of parameters, arithmetic and memory traffic by layer and by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from repvgg._arguments import check_model
from repvgg._html import table as html_table
from repvgg.errors import UsageError
from repvgg.measure.memory import weight_bytes
from repvgg.measure.ops import Op, Walk, walk

TILES = (2, 4)


@dataclass(frozen=True)
class Row:
    """Cost of one part of a model in one forward pass of the whole batch."""

    name: str  # path of a layer or stage; "" for ops outside of them, and for the total
    kind: str  # class of that module
    params: int  # number of parameter values; shared ones count at their first name, buffers do not count
    ops: int  # number of executed ops; 0 for a part that the forward pass does not reach in eval mode
    macs: int  # multiply-adds of convolutions and matrix products, which the paper prints as FLOPs (§2.4)
    winograd_muls: int  # multiplications if a Winograd algorithm is used wherever it applies
    bytes_read: int  # inputs and weights of each op; see traffic.py
    bytes_written: int  # outputs
    # Peak activation memory while one of its ops runs, wherever in the model the activations were created; images
    # count, parameters do not.
    peak_bytes: int
    # Names of ops whose multiply-adds are unknown: if there are any, `macs` and `winograd_muls` are lower bounds.
    unknown: tuple[str, ...] = ()
    unknown_traffic: tuple[str, ...] = ()  # the same for the bytes read and written

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float | None:
        """Arithmetic intensity in multiply-adds per byte moved; None if either is unknown.

        A multiply-add is two floating point operations: a roofline in FLOPs per byte takes twice this value.
        """
        known = self.bytes_moved and not self.unknown and not self.unknown_traffic
        return self.macs / self.bytes_moved if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived values as JSON types."""
        lists = {"unknown": list(self.unknown), "unknown_traffic": list(self.unknown_traffic)}
        return {**asdict(self), "bytes_moved": self.bytes_moved, "macs_per_byte": self.intensity, **lists}


@dataclass(frozen=True, repr=False)
class Profile:
    """One forward pass as three tables with equal sums; of the peaks, the total has the highest."""

    # A row for each module that executes ops or owns parameters itself, in the order of execution; modules that were
    # not reached come last.
    layers: tuple[Row, ...]
    stages: tuple[Row, ...]  # the same by stage; see stage_paths
    total: Row  # the sum
    weight_bytes: int  # memory of parameters and buffers
    tile: int  # of the Winograd algorithm that was counted, F(tile x tile, 3x3)

    def rows(self, per: Literal["layer", "stage", "total"]) -> tuple[Row, ...]:
        """Return the table at that granularity."""
        return {"layer": self.layers, "stage": self.stages, "total": (self.total,)}[per]

    def __repr__(self) -> str:
        return f"Profile({self._summary})"

    def _repr_html_(self) -> str:
        columns = ("layer", "parameters", "multiply-adds", "bytes moved", "activation peak (bytes)")
        rows = [
            (row.name or "(root)", row.params, row.macs, row.bytes_moved, row.peak_bytes)
            for row in (*self.layers, self.total)
        ]
        rows[-1] = ("total", *rows[-1][1:])
        return html_table(self._summary, columns, rows)

    @property
    def _summary(self) -> str:
        total, bound = self.total, "at least " if self.total.unknown else ""
        return (
            f"{len(self.layers)} layers, {total.params:,} parameters, {bound}{total.macs:,} multiply-adds, "
            f"activation peak {total.peak_bytes:,} bytes"
        )


def profile(model: nn.Module, inputs: Tensor | Sequence[Tensor], *, tile: int = 2) -> Profile:
    """Run ``model`` once in eval mode and break its cost down by layer and stage.

    Args:
        model: any module; it is not changed. On the meta device nothing is computed and no memory is used.
        inputs: its argument, or its arguments.
        tile: 2 or 4, the outputs of a Winograd tile along each axis: F(2x2, 3x3) multiplies 4/9 as often as a direct
            3x3 convolution of stride 1, F(4x4, 3x3) a quarter as often, at every image size.

    Raises:
        UsageError: another tile, or inputs that are not tensors.

    Limits: see :func:`repvgg.measure.walk`.
    """
    check_model(model, "profile")
    if tile not in TILES:
        raise UsageError(f"Winograd multiplications are counted for tiles of 2 or 4 outputs, not {tile}.")
    ops, params, stages = walk(model, inputs).ops, _own_parameters(model), stage_paths(model)

    def table(key: Callable[[str], str]) -> tuple[Row, ...]:
        parts: dict[str, tuple[list[Op], list[int]]] = {}
        for op in ops:  # ops first, so that rows are in the order of execution
            parts.setdefault(key(op.path), ([], []))[0].append(op)
        for path, number in params.items():
            parts.setdefault(key(path), ([], []))[1].append(number)
        return tuple(_row(name, model, *part, tile) for name, part in parts.items())

    layers, by_stage = table(lambda path: path), table(lambda path: _stage_of(path, stages))
    return Profile(layers, by_stage, _row("", model, ops, params.values(), tile), weight_bytes(model), tile)


def _row(name: str, model: nn.Module, ops: Sequence[Op], params: Iterable[int], tile: int) -> Row:
    part = Walk(tuple(ops))
    return Row(
        name=name,
        kind=type(model.get_submodule(name)).__name__,
        params=sum(params),
        ops=len(ops),
        macs=part.macs,
        winograd_muls=part.muls(tile),
        bytes_read=part.bytes_read,
        bytes_written=part.bytes_written,
        peak_bytes=part.peak,
        unknown=part.unknown,
        unknown_traffic=part.unknown_traffic,
    )


def _own_parameters(model: nn.Module) -> Counter[str]:
    """Count the parameter values that each module owns itself, by its path."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # shared parameters appear under their first name only
        counts[name.rpartition(".")[0]] += parameter.numel()
    return counts


def stage_paths(model: nn.Module) -> list[str]:
    """Return the paths of the stages of a model: its children, with containers replaced by their own children.

    Containers are module lists and dicts, and sequences that hold another sequence, list or dict.
    """
    return [path for name, child in model.named_children() for path in _expand_containers(name, child)]


def _expand_containers(path: str, module: nn.Module) -> Iterator[str]:
    children = dict(module.named_children())
    lists = (nn.ModuleList, nn.ModuleDict)
    nested = isinstance(module, nn.Sequential) and any(
        isinstance(c, (nn.Sequential, *lists)) for c in children.values()
    )
    if children and (isinstance(module, lists) or nested):
        for name, child in children.items():
            yield from _expand_containers(f"{path}.{name}", child)
    else:
        yield path


def _stage_of(path: str, stages: list[str]) -> str:
    """Return the stage that contains ``path``; "" for ops of the model itself."""
    return next((stage for stage in stages if path == stage or path.startswith(f"{stage}.")), "")
