"""Parameters and arithmetic of the networks of a study: counted once, kept as a cell, shown beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from repvgg.studies import counts
from repvgg.studies.cells import Cell
from repvgg.studies.networks import title_of
from repvgg.studies.paper import PrintedModel
from repvgg.studies.tables import Column, Table, Value

COUNTS = "counts"
_UNITS = {"params": 1e6, "macs": 1e9, "winograd_muls": 1e9}
_TITLES = {"params": "Params", "macs": "Theo FLOPs", "winograd_muls": "Wino MULs"}


def counted(table: str, models: Sequence[str]) -> Cell:
    """The counts of these rows of "table4" or "table5", by model, as JSON knows them.

    Raises:
        MissingDependencyError: the library that builds one of them is not installed.
    """
    rows = counts.count_rows(cast("counts.Table", table), models)
    return {
        row.model: {
            **{column: row.count(cast("counts.Column", column)) for column in _UNITS},
            "differences": [
                {"column": one.column, "reason": one.reason, "explained": one.explained} for one in row.differences
            ],
        }
        for row in rows
    }


def counts_of(model: str, cell: Cell) -> tuple[Value, ...]:
    """Parameters in 10⁶, multiply-adds and Winograd multiplications in 10⁹; None where they were not counted."""
    found = cell.get(model)
    return tuple(found[column] / unit if found else None for column, unit in _UNITS.items())


def count_table(name: str, rows: Sequence[PrintedModel], cell: Cell) -> Table:
    """What the paper prints beside what was counted here, and why a number differs."""
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
    body = []
    for row in rows:
        params, flops, muls = counts_of(row.model, cell)
        printed = (row.params_millions, row.flops_billions, row.winograd_muls_billions)
        differences = _differences(cell.get(row.model))
        body.append(
            (title_of(row.model), printed[0], params, printed[1], flops, printed[2], muls, ", ".join(differences))
        )
    note = (
        "Counted in the plain form for one image of the size that the paper takes; a multiply-add is one FLOP (§2.4)."
    )
    return Table(f"{name}-counts", "Parameters and arithmetic", columns, tuple(body), (note, *_reasons(rows, cell)))


def _differences(found: Any) -> list[str]:
    return [_TITLES[one["column"]] for one in found["differences"]] if found else []


def _reasons(rows: Sequence[PrintedModel], cell: Cell) -> list[str]:
    """One note a reason, with all numbers that it explains."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        for one in cell.get(row.model, {}).get("differences", ()):
            reason = one["reason"] if one["explained"] else "not explained"
            by_reason.setdefault(reason, []).append(f"{title_of(row.model)} ({_TITLES[one['column']]})")
    return [f"{', '.join(names)}: {reason}." for reason, names in by_reason.items()]
