"""Parameters, FLOPs and Winograd multiplications of every row of Tables 4 and 5, next to the printed numbers.

A count that does not round to the printed number is explained by another counting rule, if one is known that does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from repvgg._contexts import meta_device
from repvgg.collapse import fold_batch_norms
from repvgg.errors import UsageError
from repvgg.measure import Op, Walk, walk
from repvgg.models import BASELINES, SPECS, create_baseline, create_model
from repvgg.studies.paper import TABLE_4, TABLE_5, PrintedModel
from repvgg.studies.store import Cell
from repvgg.studies.tables import Column, Table, Value

PaperTable = Literal["table4", "table5"]
Quantity = Literal["params", "macs", "winograd_muls"]

TABLES: dict[str, tuple[PrintedModel, ...]] = {"table4": TABLE_4, "table5": TABLE_5}

#: Unit of the printed numbers, and their decimal places.
PRINTED_AS: dict[Quantity, tuple[int, int]] = {"params": (10**6, 2), "macs": (10**9, 1), "winograd_muls": (10**9, 1)}

_TITLES: dict[Quantity, str] = {"params": "Params", "macs": "Theo FLOPs", "winograd_muls": "Wino MULs"}

COUNTS = "counts"  # key of the cell


@dataclass(frozen=True)
class Difference:
    """A count that does not round to the printed number, and another counting rule."""

    column: Quantity  # which count
    reason: str = ""  # how the paper counts or rounds; empty if unknown
    recounted: int | None = None  # the count by that rule; None if no rule is known
    written: str | None = None  # the recount as the paper would print it; None for a dash
    explained: bool = False  # whether `written` is the printed number


@dataclass(frozen=True)
class CountRow:
    """Our counts of one model, and the printed ones."""

    model: str  # name of an architecture or a baseline
    title: str  # as the paper prints it
    input_size: int  # height and width of the image in pixels
    params_train: int  # parameters in the train form
    # Parameters in the plain form, branches merged and batch norms folded, as the paper counts (§4.1, Eq. 3).
    params: int
    macs: int  # multiply-adds of the plain form for one image, which the paper prints as FLOPs (§2.4)
    winograd_muls: int  # multiplications of the plain form with 4/9 for every stride-1 3x3 convolution (§2.4)
    paper: PrintedModel  # the printed row
    differences: tuple[Difference, ...]  # one for each count that does not round to the printed number

    def count(self, column: Quantity) -> int:
        """Return our count for a column of the paper."""
        return {"params": self.params, "macs": self.macs, "winograd_muls": self.winograd_muls}[column]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**asdict(self), "differences": [asdict(difference) for difference in self.differences]}


@dataclass(frozen=True)
class Recount:
    """Another rule for counting Winograd multiplications."""

    reason: str
    reduced: Callable[[Op], bool]  # whether an op that a Winograd algorithm could compute counts 4/9


_TRUNCATED = "cut, not rounded, in the paper"

_LARGE_ONLY = Recount(
    "4/9 for the 3x3 convolutions on 28x28 pixels and above only. Which ones its library computed so the paper tested, "
    "and does not list (§2.4, footnote 3). It prints ResNeXt-50 with 4/9 for all of them: 4.1, and 4.2 by this rule",
    lambda op: op.outputs[0][-1] >= 28,
)
_NOT_DEPTHWISE = Recount(
    "4/9 for no depthwise convolution, and no other 3x3 has stride 1. The paper found that none of them is computed so "
    "(§4.1), and prints a dash",
    lambda op: op.inputs[1][1] > 1,  # input channels of a group, from the weight (O, I/groups, kH, kW)
)

RECOUNTS = {
    "regnetx_3_2gf": _LARGE_ONLY,
    "regnetx_12gf": _LARGE_ONLY,
    "resnext101_32x4d": _LARGE_ONLY,
    "efficientnet_b0": _NOT_DEPTHWISE,
    "efficientnet_b3": _NOT_DEPTHWISE,
}


def count_rows(table: PaperTable, models: Collection[str] | None = None) -> list[CountRow]:
    """Count every model of Table 4 or 5 on the meta device, where nothing is computed and no memory is used.

    Baselines are built by :func:`repvgg.models.create_baseline`, and their batch norms folded by
    :func:`repvgg.fold_batch_norms`.

    Args:
        table: "table4" or "table5".
        models: names of the rows to count; None counts all.

    Returns:
        One row a model, in the order of the table.

    Raises:
        UsageError: there is no such table.
        MissingDependencyError: timm, which builds ResNeXt-101 and RegNetX-12GF, is not installed.
    """
    if table not in TABLES:
        raise UsageError(f"There is no table {table!r}: choose {' or '.join(TABLES)}.")
    return [_count_row(printed) for printed in TABLES[table] if models is None or printed.model in models]


def rounded(column: Quantity, count: int) -> str:
    """Return a count rounded to as many digits as the paper prints."""
    unit, digits = PRINTED_AS[column]
    return f"{count / unit:.{digits}f}"


def truncated(column: Quantity, count: int) -> str:
    """Return a count truncated to as many digits as the paper prints."""
    unit, digits = PRINTED_AS[column]
    return rounded(column, count - count % (unit // 10**digits))  # in integers: floats would round up


def printed_text(column: Quantity, paper: PrintedModel) -> str | None:
    """Return the printed number; None for a dash."""
    value = {
        "params": paper.params_millions,
        "macs": paper.flops_billions,
        "winograd_muls": paper.winograd_muls_billions,
    }[column]
    return None if value is None else f"{value:.{PRINTED_AS[column][1]}f}"


def title_of(name: str) -> str:
    """Return the name as papers print it: "RepVGG-A0", "ResNet-18"."""
    if name in BASELINES:
        return BASELINES[name].title
    return "RepVGG-" + name.removeprefix("repvgg_").upper().replace("G", "g")


def _count_row(paper: PrintedModel) -> CountRow:
    name = paper.model
    size = (SPECS[name] if name in SPECS else BASELINES[name]).input_size
    image = torch.empty(1, 3, size, size, device="meta")  # counts need shapes only
    train, plain = _train_and_plain(name, image)
    done = walk(plain, image)
    params = sum(parameter.numel() for parameter in plain.parameters())
    counts: dict[Quantity, int] = {"params": params, "macs": done.macs, "winograd_muls": done.muls()}
    return CountRow(
        model=name,
        title=title_of(name),
        input_size=size,
        params_train=sum(parameter.numel() for parameter in train.parameters()),
        paper=paper,
        differences=tuple(
            _explain(column, count, paper, done)
            for column, count in counts.items()
            if rounded(column, count) != printed_text(column, paper)
        ),
        **counts,
    )


def _train_and_plain(name: str, image: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    if name in SPECS:
        with meta_device():
            return create_model(name).eval(), create_model(name, plain=True).eval()
    # Baselines have no branches to merge; the paper counts them with batch norms folded.
    model = create_baseline(name, values=False).eval()
    return model, fold_batch_norms(model, image)[0]


def _explain(column: Quantity, count: int, paper: PrintedModel, done: Walk) -> Difference:
    printed = printed_text(column, paper)
    if truncated(column, count) == printed:
        return Difference(column, _TRUNCATED, count, printed, explained=True)
    if column != "winograd_muls" or paper.model not in RECOUNTS:
        return Difference(column)
    rule = RECOUNTS[paper.model]
    again = sum(op.macs if op.muls() < op.macs and not rule.reduced(op) else op.muls() for op in done.ops)
    # The paper prints a dash where the column would repeat the FLOPs.
    written = None if again == done.macs else rounded(column, again)
    return Difference(column, rule.reason, again, written, explained=written == printed)


def count_cell(table: str, models: Sequence[str]) -> Cell:
    """Count these rows of "table4" or "table5", by model, as JSON types.

    Raises:
        MissingDependencyError: the library that builds one of the models is not installed.
    """
    rows = count_rows(cast("PaperTable", table), models)
    return {
        row.model: {
            **{column: row.count(column) for column in PRINTED_AS},
            "differences": [
                {"column": one.column, "reason": one.reason, "explained": one.explained} for one in row.differences
            ],
        }
        for row in rows
    }


def counts_of(model: str, cell: Cell) -> tuple[Value, ...]:
    """Return parameters in 10⁶, multiply-adds and Winograd multiplications in 10⁹; None if they were not counted."""
    found = cell.get(model)
    return tuple(found[column] / unit if found else None for column, (unit, _) in PRINTED_AS.items())


def count_table(name: str, rows: Sequence[PrintedModel], cell: Cell) -> Table:
    """Return the printed counts next to ours, with the reasons for the differences as notes."""
    columns = (
        Column("model", "Model"),
        Column("paper_params_millions", "Params, paper (M)", 2),
        Column("params_millions", "Params here (M)", 3),
        Column("paper_flops_billions", "Theo FLOPs, paper (B)", 1),
        Column("flops_billions", "Theo FLOPs here (B)", 3),
        Column("paper_winograd_muls_billions", "Wino MULs, paper (B)", 1),
        Column("winograd_muls_billions", "Wino MULs here (B)", 3),
        Column("differences", "Not as printed"),
    )
    body: list[tuple[Value, ...]] = []
    # Several models share a reason: one note for each reason keeps the table readable.
    models_by_reason: dict[str, list[str]] = {}
    for row in rows:
        params, flops, muls = counts_of(row.model, cell)
        differences = cell.get(row.model, {}).get("differences", ())
        for one in differences:
            reason = one["reason"] if one["explained"] else "not explained"
            models_by_reason.setdefault(reason, []).append(f"{title_of(row.model)} ({_TITLES[one['column']]})")
        body.append(
            (
                title_of(row.model),
                row.params_millions,
                params,
                row.flops_billions,
                flops,
                row.winograd_muls_billions,
                muls,
                ", ".join(_TITLES[one["column"]] for one in differences),
            )
        )
    notes = (
        "Counted in the plain form for one image of the paper's size; a multiply-add is one FLOP (§2.4).",
        *(f"{', '.join(models)}: {reason}." for reason, models in models_by_reason.items()),
    )
    return Table(f"{name}-counts", "Parameters and arithmetic", columns, tuple(body), notes)
