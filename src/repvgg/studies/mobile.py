"""The networks for small devices that the paper leaves out of its comparisons, beside RepVGG on this machine.

    repvgg study mobile

Expected on 2 cores: 2 minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from repvgg.measure import count
from repvgg.models import named_model
from repvgg.studies.candidates import plain_form
from repvgg.studies.cells import Cell, Cells
from repvgg.studies.count_table import COUNTS, counts_of
from repvgg.studies.networks import (
    ALL_GMACS,
    NetworkSettings,
    lead_of,
    measure_table,
    plane_points,
    resolved,
    speeds_of,
    taking_part,
    title_of,
    undominated,
)
from repvgg.studies.paper import TABLE_4
from repvgg.studies.report.charts import Chart, draw_scatter
from repvgg.studies.speeds import Speeds
from repvgg.studies.study import OnProgress, Outcome, Study
from repvgg.studies.tables import Column, Table, Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BASELINE = "mobilenet_v2"


@dataclass(frozen=True)
class Published:
    """What its authors print of a network: top-1 on ImageNet-1K, parameters in 10⁶, multiply-adds in 10⁹, and where."""

    model: str
    top1_percent: float
    params_millions: float
    flops_billions: float
    source: str


_SHUFFLENET = "Ma et al., ECCV 2018"
_MOBILEONE = "Vasu et al., CVPR 2023"
_OURS = ("repvgg_a0", "repvgg_a1", "repvgg_b0", "repvgg_a2")
ROWS = (
    *(
        Published(row.model, row.top1_percent, row.params_millions, row.flops_billions, "RepVGG, Table 4")
        for row in TABLE_4
        if row.model in _OURS
    ),
    Published("shufflenet_v2_x0_5", 60.3, 1.4, 0.041, _SHUFFLENET),
    Published("shufflenet_v2_x1_0", 69.4, 2.3, 0.146, _SHUFFLENET),
    Published("shufflenet_v2_x2_0", 74.9, 7.4, 0.591, _SHUFFLENET),
    Published("mobilenet_v2", 72.0, 3.4, 0.300, "Sandler et al., CVPR 2018"),
    Published("mobilenet_v3_large", 75.2, 5.4, 0.219, "Howard et al., ICCV 2019"),
    Published("mobileone_s0", 71.4, 2.1, 0.275, _MOBILEONE),
    Published("mobileone_s1", 75.9, 4.8, 0.825, _MOBILEONE),
    Published("mobileone_s2", 77.4, 7.8, 1.299, _MOBILEONE),
    Published("mobileone_s3", 78.1, 10.1, 1.896, _MOBILEONE),
    Published("mobileone_s4", 79.4, 14.8, 2.978, _MOBILEONE),
)


def _measure(settings: NetworkSettings, cells: Cells, on_progress: OnProgress) -> None:
    """Count first, which takes seconds, then time."""
    if COUNTS not in cells:
        cells.put(COUNTS, {row.model: _counted(row.model) for row in taking_part(ROWS, settings)})
    measure_table(ROWS, _BASELINE)(settings, cells, on_progress)


def _counted(name: str) -> dict[str, int]:
    """The counts of the plain form for one image, on the meta device."""
    sourced = named_model(name, values=False)
    image = torch.empty(1, *sourced.input_shape, device="meta")
    counts = count(plain_form(sourced.model, image), (1, *sourced.input_shape))
    return {"params": counts.params, "macs": counts.macs, "winograd_muls": counts.winograd_muls}


def _outcome(settings: NetworkSettings, values: Mapping[str, Cell]) -> Outcome:
    accuracies = {row.model: row.top1_percent for row in taking_part(ROWS, settings)}
    speeds = speeds_of(settings, values)
    best = undominated(accuracies, speeds)
    words = "Top-1 accuracy as published against images per second on this machine"
    picture = Chart("mobile", words, partial(_draw, accuracies=accuracies, speeds=speeds))
    return Outcome(lead_of(best), (_table(settings, speeds, values.get(COUNTS, {}), best),), (picture,))


def _table(settings: NetworkSettings, speeds: Speeds, counts: Cell, best: list[str]) -> Table:
    columns = (
        Column("model", "Model"),
        Column("published_top1_percent", "Top-1, published (%)", 1),
        Column("images_per_second", "Speed here (images/s)", 1),
        Column("images_per_second_q1", "lower quartile", 1),
        Column("images_per_second_q3", "upper quartile", 1),
        Column("speed_up", f"× {title_of(_BASELINE)} here", 2),
        Column("published_params_millions", "Params, published (M)", 1),
        Column("params_millions", "Params here (M)", 2),
        Column("published_flops_billions", "Theo FLOPs, published (B)", 3),
        Column("flops_billions", "Theo FLOPs here (B)", 3),
        Column("winograd_muls_billions", "Wino MULs here (B)", 3),
        Column("undominated", "none faster and more accurate"),
        Column("source", "Published in"),
    )
    rows = tuple(_row(row, speeds, counts, best) for row in taking_part(ROWS, settings))
    notes = (
        f"{speeds.extent} Counted in the plain form, branches merged and batch norms folded.",
        "Published accuracies come of different recipes. RepVGG's are those of 120 epochs with crops and flips alone "
        "(the paper, §4.1).",
    )
    return Table("mobile", "Beside networks for small devices", columns, rows, notes)


def _row(row: Published, speeds: Speeds, counts: Cell, best: list[str]) -> tuple[Value, ...]:
    faster = speeds.ratio(row.model, _BASELINE)
    params, flops, muls = counts_of(row.model, counts)
    return (
        title_of(row.model),
        row.top1_percent,
        speeds.images_per_second(row.model),
        *speeds.quartiles(row.model),
        faster.median if faster else None,
        row.params_millions,
        params,
        row.flops_billions,
        flops,
        muls,
        row.model in best,
        row.source,
    )


def _draw(figure: Figure, accuracies: Mapping[str, float], speeds: Speeds) -> None:
    points = plane_points(accuracies, speeds)
    draw_scatter(figure.add_subplot(), "Accuracy and speed", points, "images per second here", "top-1 accuracy (%)")


STUDY = Study(
    name="mobile",
    title="Beside ShuffleNet, MobileNet and MobileOne, which the paper leaves out",
    about=(
        "Accuracies are those that the authors publish; nothing is trained here. Speeds are measured as in table4: all "
        "networks interleaved, ours and MobileOne in the plain form, batch norms of the others folded, medians over "
        "the rounds. Few multiply-adds are no speed by themselves: depthwise convolutions move many bytes for each."
    ),
    settings=NetworkSettings,
    resolve=partial(resolved, gmacs_on_cpu=ALL_GMACS),
    measure=_measure,
    outcome=_outcome,
)
