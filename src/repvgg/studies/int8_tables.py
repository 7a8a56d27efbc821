"""Tables, chart and sentence of ``repvgg study int8``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from repvgg.deploy.int8 import RUNTIMES
from repvgg.studies.base import Outcome
from repvgg.studies.int8_rows import LARGEST_FACTOR, OURS, Family, Row, as_key
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.store import Cell
from repvgg.studies.tables import Column, Table, Value

Cells: TypeAlias = Mapping[Row, Cell | None]

_KEYS = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}
_SHOWN = 3  # of the rows of ONNX Runtime in the chart: the best ones; the table has all


def int8_outcome(networks: Mapping[str, Cells], batch: int) -> Outcome:
    """Return what the study shows; cells that are missing are dashes."""
    tables: list[Table] = [_summary_table(networks)] if len(networks) > 1 else []
    charts: list[Chart] = []
    for name, every in networks.items():
        cells = {row: cell for row, cell in every.items() if not row.rescales}
        tables += [_quality_table(name, cells), *_rescaled_table(name, every), _cost_table(name, cells, batch)]
        charts += [_chart(name, cells, runtime) for runtime in RUNTIMES if _best(cells, runtime, None) is not None]
    leads = [sentence for name, cells in networks.items() if (sentence := _lead(name, cells))]
    return Outcome(" ".join(leads) or "Nothing was measured yet.", tuple(tables), tuple(charts))


def _summary_table(networks: Mapping[str, Cells]) -> Table:
    """Return a row for each quantization of any network, in the order of the table of each."""
    columns = [Column("row", "Quantization")]
    columns += [
        Column(f"{as_key(name)}_{_KEYS[runtime]}_sqnr_db", f"{name}, {runtime}: SQNR (dB)", 1)
        for runtime in RUNTIMES
        for name in networks
    ]
    columns += [
        Column("lowest_agreement_percent", "lowest agreement (%)", 2),
        Column("lowest_difference_points", "lowest top-1 or mIoU − float (points)", 2),
    ]
    by_key: dict[str, dict[str, Cell]] = {}
    titles: dict[str, str] = {}
    for name, cells in networks.items():
        for row, cell in cells.items():
            if not row.rescales and cell is not None:
                titles.setdefault(row.key, row.title)
                by_key.setdefault(row.key, {})[name] = cell
    order = list(dict.fromkeys(row.key for cells in networks.values() for row in cells))
    body: list[tuple[Value, ...]] = []
    for key in sorted(by_key, key=order.index):
        found = by_key[key]
        results = [_result(cell, runtime) for cell in found.values() for runtime in RUNTIMES]
        agreements = [100 * one["agreement"] for one in results if one]
        differences = [
            100 * one[metric]["difference"] for one in results for metric in ("accuracy", "miou") if metric in one
        ]
        sqnrs = [_sqnr(found.get(name), runtime) for runtime in RUNTIMES for name in networks]
        body.append((titles[key], *sqnrs, min(agreements, default=None), min(differences, default=None)))
    return Table("int8-summary", "all networks", tuple(columns), tuple(body))


def _rescaled_table(name: str, cells: Cells) -> list[Table]:
    """Return the table of the network with channels of random scales, if it was measured."""
    pairs = [(row, cell) for row, cell in cells.items() if row.rescales and cell is not None]
    if not pairs:
        return []
    plain = {row.key: (row.title, cell) for row, cell in cells.items() if not row.rescales}
    columns = [Column("row", "Quantization")]
    for runtime in RUNTIMES:
        prefix = _KEYS[runtime]
        columns += [
            Column(f"{prefix}_sqnr_db", f"{runtime}: SQNR as it is (dB)", 1),
            Column(f"{prefix}_rescaled_sqnr_db", "with randomly rescaled channels (dB)", 1),
            Column(f"{prefix}_rescaled_agreement_percent", "rescaled: agreement (%)", 2),
        ]
    body: list[tuple[Value, ...]] = []
    for row, cell in pairs:
        title, before = plain.get(row.rescales, (row.title, None))
        values: list[Value] = [title]
        for runtime in RUNTIMES:
            agreement = _result(cell, runtime).get("agreement")
            values += [_sqnr(before, runtime), _sqnr(cell, runtime), None if agreement is None else 100 * agreement]
        body.append(tuple(values))
    title = f"{name}: the same function with channels of random scales, up to {LARGEST_FACTOR:,.0f}x"
    return [Table(f"int8-{name}-rescaled", title, tuple(columns), tuple(body), _failures(dict(pairs)))]


def _failures(cells: Cells) -> tuple[str, ...]:
    return tuple(f"{row.title}: {cell['failed']}" for row, cell in cells.items() if cell and "failed" in cell)


def _result(cell: Cell | None, runtime: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (cell or {}).get("runtimes", {}).get(runtime, {})
    return found


def _sqnr(cell: Cell | None, runtime: str) -> float | None:
    return _result(cell, runtime).get("sqnr_db")


def _best(cells: Cells, runtime: str, family: Family | None) -> tuple[Row, float] | None:
    """Return the row of the highest SQNR, of one family or of all that quantize."""
    found = [
        (row, value)
        for row, cell in cells.items()
        if not row.rescales and (row.family == family if family else row.family != "float")
        if (value := _sqnr(cell, runtime)) is not None
    ]
    return max(found, key=lambda pair: pair[1], default=None)


def _lead(name: str, cells: Cells) -> str:
    parts = []
    for runtime in RUNTIMES:
        ours = next((_result(cell, runtime) for row, cell in cells.items() if row.key == OURS), {})
        others = [one for family in ("onnxruntime", "nncf") if (one := _best(cells, runtime, family)) is not None]
        if ours and others:
            best = ", ".join(f"{row.title} {value:.1f} dB" for row, value in others)
            sqnr = ours["sqnr_db"]
            parts.append(
                f"in {runtime} all steps {sqnr:.1f} dB and {ours['agreement']:.2%} agreement (the best of {best})"
            )
    return f"{name}: {'; '.join(parts)}." if parts else ""


def _quality_table(name: str, cells: Cells) -> Table:
    measured = [_result(cell, runtime) for cell in cells.values() for runtime in RUNTIMES]
    metric = "mIoU" if any("miou" in one for one in measured) else "top-1"
    key = "miou" if metric == "mIoU" else "accuracy"
    columns = [Column("row", "Quantization")]
    for runtime in RUNTIMES:
        prefix = _KEYS[runtime]
        columns += [
            Column(f"{prefix}_sqnr_db", f"{runtime}: SQNR (dB)", 1),
            Column(f"{prefix}_agreement_percent", f"{runtime}: agreement (%)", 2),
            Column(f"{prefix}_{key}_percent", f"{runtime}: {metric} (%)", 2),
            Column(f"{prefix}_difference_points", f"{runtime}: {metric} − float (points)", 2),
            Column(f"{prefix}_difference_low", "95 %: from", 2),
            Column(f"{prefix}_difference_high", "to", 2),
        ]
    columns.append(Column("saturation_db", "lost to saturation in ONNX Runtime (dB)", 1))
    columns.append(Column("images", "Images", 0))
    body = []
    for row, cell in cells.items():
        values: list[Value] = [row.title]
        for runtime in RUNTIMES:
            values += _quality_values(_result(cell, runtime), key)
        saturation = None if row.family == "float" else _result(cell, RUNTIMES[0]).get("saturation_db")
        images = next((one["images"] for runtime in RUNTIMES if (one := _result(cell, runtime))), None)
        body.append((*values, saturation, images))
    title = f"{name}: what is kept of the float network"
    return Table(f"int8-{name}", title, tuple(columns), tuple(body), _failures(cells))


def _quality_values(found: Mapping[str, Any], key: str) -> list[Value]:
    if not found:
        return [None] * 6
    paired = found.get(key, {})
    low, high = paired.get("interval", (None, None))
    points = [None if value is None else 100 * value for value in (paired.get("difference"), low, high)]
    candidate = paired.get("candidate")
    return [
        found["sqnr_db"],
        100 * found["agreement"],
        None if candidate is None else 100 * candidate,
        *points,
    ]


def _cost_table(name: str, cells: Cells, batch: int) -> Table:
    columns = [
        Column("row", "Quantization"),
        Column("megabytes", "File (MB)", 2),
        Column("seconds", "Time to quantize (s)", 1),
    ]
    timed = any("latency" in _result(cell, runtime) for cell in cells.values() for runtime in RUNTIMES)
    for runtime in RUNTIMES if timed else ():
        prefix = _KEYS[runtime]
        columns += [
            Column(f"{prefix}_milliseconds", f"{runtime}: a call (ms)", 2),
            Column(f"{prefix}_float_milliseconds", "float32 (ms)", 2),
            Column(f"{prefix}_speedup", "times as fast", 2),
        ]
    body: list[tuple[Value, ...]] = []
    for row, cell in cells.items():
        latencies = [_result(cell, runtime).get("latency", {}) for runtime in RUNTIMES]
        keys = ("milliseconds", "float_milliseconds", "speedup")
        measured = cell or {}
        megabytes = measured["bytes"] / 1e6 if "bytes" in measured else None
        times = [one.get(key) for one in latencies for key in keys] if timed else []
        body.append((row.title, megabytes, measured.get("seconds"), *times))
    notes = (f"Calls of {batch} {'image' if batch == 1 else 'images'}.",) if timed else ()
    return Table(f"int8-{name}-cost", f"{name}: size and time", tuple(columns), tuple(body), notes)


def _chart(name: str, cells: Cells, runtime: str) -> Chart:
    ranked = sorted(cells.items(), key=lambda pair: -(_sqnr(pair[1], runtime) or -100.0))
    libraries = [row for row, cell in ranked if row.family == "onnxruntime" and _sqnr(cell, runtime) is not None]
    hidden = set(libraries[_SHOWN:-1])  # the worst one is shown
    bars = [
        Bar(row.title, max(value, 0.0), text=f"{value:.1f} dB", ours=row.family in ("ours", "trained"))
        for row, cell in cells.items()
        if row.family != "float" and row not in hidden and (value := _sqnr(cell, runtime)) is not None
    ]
    hint = _hidden(hidden)
    draw = partial(draw_bars, title=f"{name} in {runtime}", unit=f"SQNR of the logits (dB){hint}", bars=bars)
    return Chart(f"int8-{name}-{_KEYS[runtime]}", f"SQNR of the logits of {name} in {runtime}, by quantization", draw)


def _hidden(rows: Sequence[Row] | set[Row]) -> str:
    return f"; {len(rows)} more settings of ONNX Runtime are in the table" if rows else ""
