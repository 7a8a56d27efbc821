"""Speed of whole networks: Tables 4 and 5 and Figure 1 of the paper, and mobile networks that the paper leaves out.

    repvgg study table4     next to the classics, trained for 120 epochs
    repvgg study table5     the largest networks, trained for 200 epochs
    repvgg study figure1    accuracy against speed
    repvgg study mobile     next to ShuffleNet, MobileNet and MobileOne

With several engines, ``--engine torch,repvgg,openvino``, every network is timed in each of them, and the tables show it
in its fastest; see :mod:`repvgg.studies.engine_speed`.

Accuracies are the published ones; speeds are measured here. Expected on 2 cores: under 20 minutes for table4 with the
networks up to 12 GMACs, 2 minutes for mobile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from repvgg.errors import UsageError, did_you_mean
from repvgg.measure import INTERLEAVED, PAPER, RunSettings, count
from repvgg.models import BASELINES, baseline_of, named_model, spec_of
from repvgg.studies.base import OnProgress, Outcome, Study, check_positive
from repvgg.studies.candidates import PLAIN, Candidate, check_engines, deployed, plain_form
from repvgg.studies.claims import (
    claims_chart,
    claims_lead,
    claims_table,
    compare_in_engines,
    pair_chart,
    pair_lead,
    pair_table,
)
from repvgg.studies.counts import COUNTS, count_cell, count_table, counts_of, title_of
from repvgg.studies.engine_speed import candidate_name, engine_table, in_fastest_engine
from repvgg.studies.paper import (
    FIGURE_1,
    MOBILE_MODELS,
    SPEED_CLAIMS,
    TABLE_4,
    TABLE_5,
    FigurePoint,
    PrintedModel,
    PublishedModel,
)
from repvgg.studies.report.charts import Bar, Chart, Point, add_panels, draw_bars, draw_scatter
from repvgg.studies.store import Cell, CellStore
from repvgg.studies.tables import SPEED_COLUMNS, Column, Table, Value
from repvgg.studies.timing import Speeds, fit_together, measure_candidates, plan_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CPU_GMACS = 12.0  # default limit of the largest networks on a CPU, where they take minutes a round
UNLIMITED_GMACS = 1000.0
_BATCH = {"cpu": 8, "cuda": PAPER.batch}  # 128 images would take a CPU seconds a call


@dataclass(frozen=True)
class NetworkSettings:
    """Settings of a study that times whole networks.

    Attributes:
        run: device, dtype, memory format and threads.
        batch: images in a call; default: 8 on a CPU and the paper's 128 on a GPU.
        rounds: how often each network is timed; default: 30.
        max_gmacs: leave out networks with more multiply-adds for an image, in 10⁹ as the paper prints them;
            default: 12 on a CPU for table4 and figure1 unless rows are chosen, no limit otherwise.
        input_size: height and width; default: 224, and 300 for EfficientNet-B3, as in the paper.
        engine: what runs the networks: torch, or another engine of 'repvgg bench'; with several, separated by commas,
            every network is timed in each, and shown in its fastest.
        rows: names of the networks to time; default: all within the limit. A row beyond a chosen limit is refused.

    Raises:
        UsageError: a number is out of its range, or an engine does not exist or support the run settings.
    """

    run: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    rounds: int | None = None
    max_gmacs: float | None = None
    input_size: int | None = None
    engine: str = "torch"
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive(batch=self.batch, rounds=self.rounds, input_size=self.input_size)
        check_engines(self.engines, self.run)
        if self.max_gmacs is not None and not self.max_gmacs > 0:
            raise UsageError(f"max_gmacs must be above 0, got {self.max_gmacs}.")

    @property
    def engines(self) -> list[str]:
        """The engines by name."""
        return self.engine.split(",")


def resolve(settings: NetworkSettings, cpu_gmacs: float) -> NetworkSettings:
    """Fill in the defaults that depend on the device; ``cpu_gmacs`` is the default of ``max_gmacs`` on a CPU."""
    device = settings.run.device
    limited = device == "cpu" and not settings.rows  # rows that were named are wanted, however large
    return replace(
        settings,
        batch=settings.batch or _BATCH[device],
        rounds=settings.rounds or INTERLEAVED.rounds,
        max_gmacs=settings.max_gmacs or (cpu_gmacs if limited else UNLIMITED_GMACS),
    )


ModelT = TypeVar("ModelT", PrintedModel, PublishedModel)


def within_limit(models: Sequence[ModelT], settings: NetworkSettings) -> list[ModelT]:
    """Return the chosen rows, or all, up to ``max_gmacs``.

    Raises:
        UsageError: there is none, or a chosen row is not in the table or beyond the limit.
    """
    for name in settings.rows:
        if name not in (names := [model.model for model in models]):
            advice = did_you_mean(name, names, f"choose one of {', '.join(names)}.")
            raise UsageError(f"The study has no row {name!r}: {advice}")
    chosen = [model for model in models if not settings.rows or model.model in settings.rows]
    limit = settings.max_gmacs or UNLIMITED_GMACS
    found = [model for model in chosen if model.flops_billions <= limit]
    if settings.rows and len(found) < len(chosen):
        beyond = [model for model in chosen if model.flops_billions > limit]
        large, most = ", ".join(model.model for model in beyond), max(model.flops_billions for model in beyond)
        raise UsageError(
            f"The rows {large} have more than {limit:g} GMACs: leave them out, or take --max-gmacs {most:g} or more."
        )
    if not found:
        least = min(model.flops_billions for model in chosen)
        raise UsageError(f"No network of this table has {limit:g} GMACs or less: take --max-gmacs {least:g} or more.")
    return found


def measure_networks(
    models: Sequence[ModelT],
    baseline: str,
    settings: NetworkSettings,
    store: CellStore,
    on_progress: OnProgress,
) -> None:
    """Add the missing rounds of all networks within the limit, as they would be deployed."""
    chosen = within_limit(models, settings)
    names, engines = [model.model for model in chosen], settings.engines
    if len(engines) == 1:
        # From the published parameters, because building every network to know its size would take minutes.
        weights = sum(model.params_millions for model in chosen) * 1e6
        groups = plan_groups(names, SPEED_CLAIMS, baseline, fit_together(weights, settings.run))
    else:  # dozens of candidates: a round of all would take too long for the ratios within it to be of one moment
        groups = plan_groups(names, SPEED_CLAIMS, "", fits=False)
    shared = _SharedNetwork()
    candidates = {
        candidate_name(name, engine): _candidate(
            name, engine, partial(shared.make, name, last=engine == engines[-1]), settings.input_size
        )
        for name in names
        for engine in engines
    }
    in_engines = [[candidate_name(name, engine) for name in group for engine in engines] for group in groups]
    protocol = replace(INTERLEAVED, rounds=settings.rounds or INTERLEAVED.rounds)
    measure_candidates(in_engines, candidates, store, settings.run, protocol, settings.batch or 1, on_progress)


class _SharedNetwork:
    """Builds each network once for all of its engines, which follow each other; each gets a network of its own."""

    def __init__(self) -> None:
        self._kept: dict[str, nn.Module] = {}  # the last one, until its last engine has it

    def make(self, name: str, last: bool) -> nn.Module:
        network = self._kept[name] if name in self._kept else deployed(name)
        self._kept.clear()
        if not last:
            self._kept[name] = copy.deepcopy(network)  # an engine may convert its network in place
        return network


def _candidate(name: str, engine: str, make: Callable[[], nn.Module], input_size: int | None) -> Candidate:
    # EfficientNet-B3 takes 300x300, all others of the tables 224x224.
    size = input_size or (baseline_of(name) if name in BASELINES else spec_of(name)).input_size
    return Candidate(candidate_name(name, engine), name, PLAIN, make, (3, size, size), engine)


def is_repvgg(name: str) -> bool:
    """Return whether a network of these studies is a RepVGG: all others are baselines."""
    return name not in BASELINES


_ABOUT = (
    "All networks are timed interleaved: every round times each of them once, and starts with the next one. Speeds are "
    "medians over the rounds; speed-ups are computed within rounds, so that a slow phase of the machine cancels. If "
    "the weights of all networks do not fit into half of the free memory, each pair is timed separately, together with "
    "the baseline of the table, and speed-ups are those within its rounds.\n\n"
    "RepVGGs run in the plain form. Batch norms of the others are folded, as in the paper (§4.1). Weights are random: "
    "speed does not depend on them. With several engines pairs are timed one after the other, without the "
    "baseline, and tables show every network in its fastest. "
    "The paper's speeds are those of a GTX 1080 Ti at a batch of 128 in float32; its "
    "claims are their ratios."
)


def _measure(
    name: str,
    table: Sequence[PrintedModel],
    baseline: str,
    settings: NetworkSettings,
    store: CellStore,
    on_progress: OnProgress,
) -> None:
    if COUNTS not in store:  # first, because it takes seconds and the timing minutes
        store.put(COUNTS, count_cell(name, [row.model for row in within_limit(table, settings)]))
    measure_networks(table, baseline, settings, store, on_progress)


def _outcome(
    name: str,
    printed: Sequence[PrintedModel],
    baseline: str,
    settings: NetworkSettings,
    values: Mapping[str, Cell],
) -> Outcome:
    rows = within_limit(printed, settings)
    timed = Speeds.from_cells(values, settings.batch or 1)
    speeds, engine_of = in_fastest_engine(timed, [row.model for row in rows], settings.engines)
    pairs = [pair for pair in SPEED_CLAIMS if set(pair) <= {row.model for row in rows}]
    images_per_second = {row.model: row.images_per_second for row in printed}
    claims = {pair: images_per_second[pair[0]] / images_per_second[pair[1]] for pair in pairs}
    counts = values.get(COUNTS, {})
    tables = [_speed_table(name, rows, baseline, speeds, counts, left_out=len(printed) - len(rows))]
    charts = [_speed_chart(name, rows, speeds)]
    lead = pair_lead(pairs, speeds)
    # The chart of the claims is first, because the paper claims ratios; speeds depend on the machine.
    if len(settings.engines) > 1:
        tables.append(engine_table(name, engine_of, timed, settings.engines))
        if found := compare_in_engines(claims, timed, settings.engines):
            lead = claims_lead(found)
            tables.insert(0, claims_table(name, found))
            charts.insert(0, claims_chart(name, found))
    elif pairs:
        tables.append(pair_table(name, claims, speeds))
        charts.insert(0, pair_chart(name, claims, speeds))
    return Outcome(lead, (*tables, count_table(name, rows, counts)), tuple(charts))


def _speed_table(
    name: str, rows: Sequence[PrintedModel], baseline: str, speeds: Speeds, counts: Cell, left_out: int
) -> Table:
    columns = (
        Column("model", "Model"),
        Column("paper_top1_percent", "Top-1, paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 0),
        *SPEED_COLUMNS,
        Column("paper_speed_up", f"× {title_of(baseline)}, paper", 2),
        Column("speed_up", f"× {title_of(baseline)} here", 2),
        Column("params_millions", "Params (M)", 2),
        Column("flops_billions", "Theo FLOPs (B)", 1),
        Column("winograd_muls_billions", "Wino MULs (B)", 1),
    )
    paper_baseline = next((row.images_per_second for row in rows if row.model == baseline), None)
    body: list[tuple[Value, ...]] = [
        (
            title_of(row.model),
            row.top1_percent,
            row.images_per_second,
            *speeds.cells(row.model),
            row.images_per_second / paper_baseline if paper_baseline else None,
            speeds.speedup(row.model, baseline),
            *counts_of(row.model, counts),
        )
        for row in rows
    ]
    notes = [f"{speeds.extent} Parameters and arithmetic as counted here."]
    if left_out:
        notes.append(f"{left_out} networks of the paper's table were left out: see max_gmacs and rows below.")
    return Table(name, "Speed, next to the paper's", columns, tuple(body), tuple(notes))


def _speed_chart(name: str, rows: Sequence[PrintedModel], speeds: Speeds) -> Chart:
    bars = []
    for row in rows:
        speed = speeds.images_per_second(row.model)
        text = speed if isinstance(speed, str) else "not measured" if speed is None else f"{speed:,.1f}"
        length = None if isinstance(speed, str) else speed
        bars.append(Bar(title_of(row.model), length, text=text, ours=is_repvgg(row.model)))
    draw: Callable[..., None] = partial(draw_bars, title="Speed on this machine", unit="images per second", bars=bars)
    return Chart(f"{name}-speed", "Images per second of each network on this machine", draw)


_X_LABEL, _Y_LABEL = "images per second here", "top-1 accuracy (%)"


def pareto_front(accuracies: Mapping[str, float], speeds: Speeds) -> list[str]:
    """Return the measured networks that no other dominates: at least as fast and accurate, and better in one."""
    found = [
        (name, accuracy, speed)
        for name, accuracy in accuracies.items()
        if isinstance(speed := speeds.images_per_second(name), float)
    ]
    return [
        name
        for name, accuracy, speed in found
        if not any(a >= accuracy and s >= speed and (a, s) != (accuracy, speed) for _, a, s in found)
    ]


def _front_lead(front: Sequence[str]) -> str:
    if not front:
        return "Nothing was measured yet."
    ours = sum(map(is_repvgg, front))
    return f"Of the {len(front)} networks than which none is both faster here and more accurate, {ours} are RepVGG."


def scatter_points(accuracies: Mapping[str, float], speeds: Speeds) -> list[Point]:
    """Return the measured networks as points."""
    points = [
        Point(title_of(name), speed, accuracy, is_repvgg(name))
        for name, accuracy in accuracies.items()
        if isinstance(speed := speeds.images_per_second(name), float)
    ]
    # Only the fastest RepVGG is labelled in full: with the others as "A1", "B2g4" the labels have space.
    fastest = max((point for point in points if point.ours), key=lambda point: point.x, default=None)
    return [one if one is fastest else replace(one, label=one.label.removeprefix("RepVGG-")) for one in points]


_FIGURE_1_MODELS = tuple({row.model: row for row in (*TABLE_4, *TABLE_5)}.values())  # B2g4 is in both tables
_PANELS = {120: "120 epochs", 200: "200 epochs"}
_MIN_POINTS = 3  # in a panel: fewer show no relation


def _figure1_outcome(settings: NetworkSettings, values: Mapping[str, Cell]) -> Outcome:
    names = {row.model for row in within_limit(_FIGURE_1_MODELS, settings)}
    timed = Speeds.from_cells(values, settings.batch or 1)
    speeds, engine_of = in_fastest_engine(timed, sorted(names), settings.engines)
    points = [point for point in FIGURE_1 if point.model in names]
    # Accuracies after different training lengths are not comparable: one front for each panel.
    panels = [{p.model: p.top1_percent for p in points if p.epochs == epochs} for epochs in _PANELS]
    front = list(dict.fromkeys(name for panel in panels for name in pareto_front(panel, speeds)))
    chart = Chart(
        "figure1",
        "Top-1 accuracy as the paper prints it against images per second on this machine",
        partial(_draw_figure1, points=points, speeds=speeds),
    )
    tables = [_figure1_table(points, speeds, front)]
    if len(settings.engines) > 1:
        tables.append(engine_table("figure1", engine_of, timed, settings.engines))
    return Outcome(_front_lead(front), tuple(tables), (chart,))


def _figure1_table(points: Sequence[FigurePoint], speeds: Speeds, front: Sequence[str]) -> Table:
    columns = (
        Column("model", "Model"),
        Column("epochs", "Epochs of training, paper"),
        Column("paper_top1_percent", "Top-1, paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 0),
        *SPEED_COLUMNS,
        Column("undominated", "none faster and more accurate"),
    )
    rows = tuple(
        (
            title_of(point.model),
            point.epochs,
            point.top1_percent,
            point.images_per_second,
            *speeds.cells(point.model),
            point.model in front,
        )
        for point in points
    )
    return Table("figure1", "Accuracy and speed", columns, rows, (speeds.extent,))


def _draw_figure1(figure: Figure, points: Sequence[FigurePoint], speeds: Speeds) -> None:
    panels = {
        epochs: scatter_points({p.model: p.top1_percent for p in points if p.epochs == epochs}, speeds)
        for epochs in _PANELS
    }
    shown = {epochs: panel for epochs, panel in panels.items() if len(panel) >= _MIN_POINTS} or panels
    for axes, (epochs, panel) in zip(add_panels(figure, len(shown)), shown.items(), strict=True):
        draw_scatter(axes, f"Trained for {_PANELS[epochs]}", panel, _X_LABEL, _Y_LABEL)


_MOBILE_BASELINE = "mobilenet_v2"


def _measure_mobile(settings: NetworkSettings, store: CellStore, on_progress: OnProgress) -> None:
    if COUNTS not in store:  # first, because it takes seconds and the timing minutes
        store.put(COUNTS, {row.model: _count_plain(row.model) for row in within_limit(MOBILE_MODELS, settings)})
    measure_networks(MOBILE_MODELS, _MOBILE_BASELINE, settings, store, on_progress)


def _count_plain(name: str) -> dict[str, int]:
    named = named_model(name, values=False)
    image = torch.empty(1, *named.input_shape, device="meta")  # counts need shapes only
    counts = count(plain_form(named.model, image), (1, *named.input_shape))
    return {"params": counts.params, "macs": counts.macs, "winograd_muls": counts.winograd_muls}


def _mobile_outcome(settings: NetworkSettings, values: Mapping[str, Cell]) -> Outcome:
    models = within_limit(MOBILE_MODELS, settings)
    accuracies = {row.model: row.top1_percent for row in models}
    timed = Speeds.from_cells(values, settings.batch or 1)
    speeds, engine_of = in_fastest_engine(timed, list(accuracies), settings.engines)
    front = pareto_front(accuracies, speeds)

    def draw(figure: Figure) -> None:
        draw_scatter(figure.add_subplot(), "Accuracy and speed", scatter_points(accuracies, speeds), _X_LABEL, _Y_LABEL)

    chart = Chart("mobile", "Top-1 accuracy as published against images per second on this machine", draw)
    tables = [_mobile_table(models, speeds, values.get(COUNTS, {}), front)]
    if len(settings.engines) > 1:
        tables.append(engine_table("mobile", engine_of, timed, settings.engines))
    return Outcome(_front_lead(front), tuple(tables), (chart,))


def _mobile_table(models: Sequence[PublishedModel], speeds: Speeds, counts: Cell, front: Sequence[str]) -> Table:
    columns = (
        Column("model", "Model"),
        Column("published_top1_percent", "Top-1, published (%)", 1),
        *SPEED_COLUMNS,
        Column("speed_up", f"× {title_of(_MOBILE_BASELINE)} here", 2),
        Column("published_params_millions", "Params, published (M)", 1),
        Column("params_millions", "Params here (M)", 2),
        Column("published_flops_billions", "Theo FLOPs, published (B)", 3),
        Column("flops_billions", "Theo FLOPs here (B)", 3),
        Column("winograd_muls_billions", "Wino MULs here (B)", 3),
        Column("undominated", "none faster and more accurate"),
        Column("source", "Published in"),
    )
    rows = []
    for row in models:
        params, flops, muls = counts_of(row.model, counts)
        rows.append(
            (
                title_of(row.model),
                row.top1_percent,
                *speeds.cells(row.model),
                speeds.speedup(row.model, _MOBILE_BASELINE),
                row.params_millions,
                params,
                row.flops_billions,
                flops,
                muls,
                row.model in front,
                row.source,
            )
        )
    notes = (
        f"{speeds.extent} Counted in the plain form, branches merged and batch norms folded.",
        "The recipes behind the published accuracies differ. RepVGG's is 120 epochs with crops and flips only (the "
        "paper, §4.1).",
    )
    return Table("mobile", "Next to networks for small devices", columns, tuple(rows), notes)


def _network_study(name: str, title: str, table: Sequence[PrintedModel], baseline: str, cpu_gmacs: float) -> Study:
    return Study(
        name=name,
        title=title,
        about=_ABOUT,
        settings=NetworkSettings,
        resolve=partial(resolve, cpu_gmacs=cpu_gmacs),
        measure=partial(_measure, name, table, baseline),
        outcome=partial(_outcome, name, table, baseline),
    )


STUDIES = (
    _network_study(
        "table4", "Table 4: speed next to ResNet, ResNeXt, EfficientNet, RegNet", TABLE_4, "resnet50", CPU_GMACS
    ),
    _network_study("table5", "Table 5: speed of the largest networks", TABLE_5, "regnetx_12gf", UNLIMITED_GMACS),
    Study(
        name="figure1",
        title="Figure 1: accuracy against speed",
        about=(
            "Accuracies are the paper's; nothing is trained here. Speeds are measured as in table4: all networks "
            "interleaved, RepVGGs in the plain form, batch norms of the others folded, medians over the rounds."
        ),
        settings=NetworkSettings,
        resolve=partial(resolve, cpu_gmacs=CPU_GMACS),
        measure=partial(measure_networks, _FIGURE_1_MODELS, "resnet50"),
        outcome=_figure1_outcome,
    ),
    Study(
        name="mobile",
        title="Next to ShuffleNet, MobileNet and MobileOne, which the paper leaves out",
        about=(
            "Accuracies are those that the authors publish; nothing is trained here. Speeds are measured as in table4: "
            "all networks interleaved, RepVGGs and MobileOnes in the plain form, batch norms of the others folded, "
            "medians over the rounds. Few multiply-adds alone do not make a network fast: depthwise convolutions move "
            "many bytes for each."
        ),
        settings=NetworkSettings,
        resolve=partial(resolve, cpu_gmacs=UNLIMITED_GMACS),
        measure=_measure_mobile,
        outcome=_mobile_outcome,
    ),
)
