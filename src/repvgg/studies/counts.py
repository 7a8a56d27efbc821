"""Parameters, FLOPs and Winograd multiplications of every row of Tables 4 and 5, beside what the paper printed.

A number that does not round to the printed one comes with another way to count, which is computed, and gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from repvgg.collapse import fold_batch_norms
from repvgg.errors import UsageError
from repvgg.measure import Op, Walk, walk
from repvgg.models import BASELINES, SPECS, create_baseline, create_model
from repvgg.studies.paper import TABLE_4, TABLE_5, PrintedModel

Table = Literal["table4", "table5"]
Column = Literal["params", "macs", "winograd_muls"]

TABLES: dict[str, tuple[PrintedModel, ...]] = {"table4": TABLE_4, "table5": TABLE_5}

#: What one printed unit stands for, and how many digits are printed behind the point.
PRINTED_AS: dict[Column, tuple[int, int]] = {"params": (10**6, 2), "macs": (10**9, 1), "winograd_muls": (10**9, 1)}


@dataclass(frozen=True)
class Difference:
    """A count that does not round to what the paper printed, and another way to count.

    Attributes:
        column: which count.
        reason: what is counted otherwise, or written otherwise; empty where nobody knows.
        recounted: the count of that other way; None where nobody knows one.
        written: the recount as the paper would print it; None for a dash.
        explained: whether that is what it printed.
    """

    column: Column
    reason: str = ""
    recounted: int | None = None
    written: str | None = None
    explained: bool = False


@dataclass(frozen=True)
class CountRow:
    """One model: what we count, and what is printed.

    Attributes:
        model: name of a row of ours, or of a baseline.
        title: as the paper prints it.
        input_size: height and width in pixels that it is counted at.
        params_train: parameters in the form that it is trained in.
        params: parameters of the plain form: branches merged, batch norms folded, as the paper counts (§4.1, Eq. 3).
        macs: multiply-adds of the plain form for one image, which the paper prints as FLOPs (§2.4).
        winograd_muls: multiplications of the plain form with 4/9 for every stride-1 3x3 convolution (§2.4).
        paper: the row of the paper.
        differences: one for each count that does not round to the printed number.
    """

    model: str
    title: str
    input_size: int
    params_train: int
    params: int
    macs: int
    winograd_muls: int
    paper: PrintedModel
    differences: tuple[Difference, ...]

    def count(self, column: Column) -> int:
        """What we count for a column of the paper."""
        return {"params": self.params, "macs": self.macs, "winograd_muls": self.winograd_muls}[column]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        return {**asdict(self), "differences": [asdict(difference) for difference in self.differences]}


@dataclass(frozen=True)
class Recount:
    """Another way to count Winograd multiplications.

    Attributes:
        reason: in words.
        spared: whether an op counts 4/9, of those that could.
    """

    reason: str
    spared: Callable[[Op], bool]


_CUT = "cut, not rounded, in the paper"

_LARGE = Recount(
    "4/9 for the 3x3 convolutions on 28x28 pixels and above only. Which ones its library computed so the paper tested, "
    "and does not list (§2.4, footnote 3). It prints ResNeXt-50 with 4/9 for all of them: 4.1, and 4.2 by this rule",
    lambda op: op.outputs[0][-1] >= 28,
)
_NOT_DEPTHWISE = Recount(
    "4/9 for no depthwise convolution, and no other 3x3 has stride 1. The paper found that none of them is computed so "
    "(§4.1), and prints a dash",
    lambda op: op.inputs[1][1] > 1,
)

RECOUNTS = {
    "regnetx_3_2gf": _LARGE,
    "regnetx_12gf": _LARGE,
    "resnext101_32x4d": _LARGE,
    "efficientnet_b0": _NOT_DEPTHWISE,
    "efficientnet_b3": _NOT_DEPTHWISE,
}


def count_rows(table: Table, models: Collection[str] | None = None) -> list[CountRow]:
    """Count every model of Table 4 or Table 5, on the meta device: nothing is computed, and no memory is used.

    Baselines are built as :func:`repvgg.models.create_baseline` says, and their batch norms are folded by
    :func:`repvgg.fold_batch_norms`.

    Args:
        table: "table4" or "table5".
        models: names of the rows to count; None takes all of them.

    Returns:
        One row a model, in the order of the table.

    Raises:
        UsageError: there is no such table.
        MissingDependencyError: timm, which builds ResNeXt-101 and RegNetX-12GF, is not installed.
    """
    if table not in TABLES:
        raise UsageError(f"There is no table {table!r}: choose {' or '.join(TABLES)}.")
    return [_counted(printed) for printed in TABLES[table] if models is None or printed.model in models]


def rounded(column: Column, count: int) -> str:
    """A count with as many digits as the paper prints, rounded."""
    unit, digits = PRINTED_AS[column]
    return f"{count / unit:.{digits}f}"


def cut(column: Column, count: int) -> str:
    """A count with as many digits as the paper prints; those behind them are left off."""
    unit, digits = PRINTED_AS[column]
    return rounded(column, count - count % (unit // 10**digits))


def printed_text(column: Column, paper: PrintedModel) -> str | None:
    """What the paper printed; None for a dash."""
    value = {
        "params": paper.params_millions,
        "macs": paper.flops_billions,
        "winograd_muls": paper.winograd_muls_billions,
    }[column]
    return None if value is None else f"{value:.{PRINTED_AS[column][1]}f}"


def _counted(paper: PrintedModel) -> CountRow:
    name, size = paper.model, _input_size(paper.model)
    image = torch.empty(1, 3, size, size, device="meta")
    train, plain = _forms(name, image)
    done = walk(plain, image)
    params = sum(parameter.numel() for parameter in plain.parameters())
    counts: dict[Column, int] = {"params": params, "macs": done.macs, "winograd_muls": done.winograd_muls}
    return CountRow(
        model=name,
        title=_title(name),
        input_size=size,
        params_train=sum(parameter.numel() for parameter in train.parameters()),
        paper=paper,
        differences=tuple(
            _difference(column, count, paper, done)
            for column, count in counts.items()
            if rounded(column, count) != printed_text(column, paper)
        ),
        **counts,
    )


def _input_size(name: str) -> int:
    return (SPECS[name] if name in SPECS else BASELINES[name]).input_size


def _title(name: str) -> str:
    return BASELINES[name].title if name in BASELINES else f"RepVGG-{name.removeprefix('repvgg_').capitalize()}"


def _forms(name: str, image: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """The form that is trained and the plain one, without values and in eval mode."""
    if name in SPECS:
        with torch.device("meta"):
            return create_model(name).eval(), create_model(name, plain=True).eval()
    model = create_baseline(name, values=False).eval()
    return model, fold_batch_norms(model, image)[0]


def _difference(column: Column, count: int, paper: PrintedModel, done: Walk) -> Difference:
    """Why a count does not round to the printed number, as far as another way to count gives it."""
    printed = printed_text(column, paper)
    if cut(column, count) == printed:
        return Difference(column, _CUT, count, printed, explained=True)
    if column != "winograd_muls" or paper.model not in RECOUNTS:
        return Difference(column)
    recount = RECOUNTS[paper.model]
    again = sum(op.macs if op.muls() < op.macs and not recount.spared(op) else op.muls() for op in done.ops)
    written = None if again == done.macs else rounded(column, again)
    return Difference(column, recount.reason, again, written, explained=written == printed)
