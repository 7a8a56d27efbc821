"""Table 8: PSPNets over RepVGG and ResNet, and what dilation costs; ``--train`` trains small ones on your data.

    repvgg study table8
    repvgg study table8 --backbones repvgg_a0 --input-size 713 --engine onnxruntime
    repvgg study table8 --train --data "masks:camvid?ignore=11" --init a0.safetensors --threads 2

Accuracies are the paper's; parameters and arithmetic are counted and speeds measured here. Expected on 2 cores: 10
minutes; a training takes half an hour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias, get_args

from torch import nn

from repvgg._contexts import meta_device
from repvgg.errors import UsageError
from repvgg.measure import INTERLEAVED, RunSettings, count
from repvgg.models import PSPNETS, PSPNetSpec, create_model, dilate_by_phases
from repvgg.models.registry import CITYSCAPES_CLASSES, RESNETS
from repvgg.studies.base import Outcome, ProgressReporter, Study, check_positive
from repvgg.studies.candidates import ENGINES, PLAIN, Candidate, check_engines
from repvgg.studies.counts import COUNTS, title_of
from repvgg.studies.paper import TABLE_8, TABLE_8_BATCH, TABLE_8_SIZE, PrintedSegmentation
from repvgg.studies.report.charts import Bar, Chart, draw_bars
from repvgg.studies.segmentation_training import (
    SmallTraining,
    missing_trainings,
    resolve_training,
    train_missing,
    training_outcome,
)
from repvgg.studies.store import Cell, CellStore
from repvgg.studies.tables import RATIO_COLUMNS, SPEED_COLUMNS, Column, Table, Value
from repvgg.studies.timing import Speeds, fit_together, measure_candidates

Form: TypeAlias = Literal["stride 32", "undilated", "fast", "normal", "by phases"]
EngineName: TypeAlias = Literal["torch", "repvgg", "repvgg-searched", "onnxruntime", "openvino"]

_FORMS: tuple[Form, ...] = get_args(Form)
_RESNET_FORMS: tuple[Form, ...] = ("normal", "by phases")
_BASELINES = ("resnet50", "resnet101")
_BATCH = {"cpu": 1, "cuda": TABLE_8_BATCH}
_SIZE = {"cpu": 361, "cuda": TABLE_8_SIZE}  # a quarter of the pixels: 713 would take a CPU 10 seconds an image and more
_ROUNDS = 10


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of Table 8.

    Attributes:
        run: device, dtype, memory format and threads.
        batch: images in a call; default: 1 on a CPU and the paper's 16 on a GPU; --train: images in a step, of the
            recipe.
        rounds: how often each network is timed; default: 10.
        input_size: height and width of the images; default: 361 on a CPU and the paper's 713 on a GPU; --train: of the
            crops, 8k + 1, of the recipe.
        backbones: RepVGGs to time, each in five forms; default: B1g2 and B2, those of the paper.
        engine: what runs the networks.
        train: train small networks on --data in place of timing large ones.
        data: --train: URI of images with masks.
        init: --train: classification checkpoint of RepVGG-A0, to start the backbones from.
        resnet_init: --train: the same of ResNet-18.
        seeds: --train: trainings of each row, with seeds 0, 1, 2, …
        rows: --train: names of the rows to train; default: all.
        output_stride: --train: image pixels per pixel of the dilated maps; 8 has four times the arithmetic of 16.
        epochs: --train: passes over the training images; default: of the recipe.
        lr: --train: peak learning rate, not scaled with the batch; default: of the recipe.
        precision: --train: of the arithmetic; default: what this machine is fast at.

    Raises:
        UsageError: a number is out of its range, a backbone is named twice or does not exist, or a setting of
            trainings is given without ``train``, or one of timing with it.
    """

    run: RunSettings = field(default_factory=RunSettings)
    batch: int | None = None
    rounds: int | None = None
    input_size: int | None = None
    backbones: tuple[str, ...] = ("repvgg_b1g2", "repvgg_b2")
    engine: EngineName = "torch"
    train: bool = False
    data: str | None = None
    init: str | None = None
    resnet_init: str | None = None
    seeds: int = 2
    rows: tuple[str, ...] = ()
    output_stride: Literal[8, 16] = 16
    epochs: int | None = None
    lr: float | None = None
    precision: Literal["auto", "float32", "bf16", "fp16"] | None = None

    def __post_init__(self) -> None:
        check_positive(
            batch=self.batch, rounds=self.rounds, input_size=self.input_size, seeds=self.seeds, epochs=self.epochs
        )
        known = [spec.backbone for spec in PSPNETS.values() if spec.backbone not in RESNETS]
        for name in self.backbones:
            if name not in known:
                raise UsageError(f"No segmentation network has the backbone {name!r}: {_listed(known)}.")
        if not self.backbones or len(set(self.backbones)) < len(self.backbones):
            raise UsageError("Name the backbones, each once.")
        check_engines([self.engine], self.run)
        if self.train and (self.run.dtype != "float32" or self.run.compile or self.engine != "torch"):
            raise UsageError("--dtype, --compile and --engine are for timing: with --train, take --precision.")
        for name in ("data", "init", "resnet_init", "rows", "epochs", "lr", "precision"):
            if not self.train and getattr(self, name):
                raise UsageError(f"--{name.replace('_', '-')} is for trainings: add --train, or leave it out.")

    @property
    def training(self) -> SmallTraining:
        """The settings of the trainings."""
        return SmallTraining(
            data=self.data,
            init=self.init,
            resnet_init=self.resnet_init,
            seeds=self.seeds,
            rows=self.rows,
            output_stride=self.output_stride,
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            crop=self.input_size,
            precision=self.precision,
            device=self.run.device,
            threads=self.run.threads,
        )


def _listed(names: Sequence[str]) -> str:
    return f"choose one of {', '.join(dict.fromkeys(names))}"


def _resolve(settings: SegmentationSettings) -> SegmentationSettings:
    device = settings.run.device
    if settings.train:
        config = resolve_training(settings.training)  # refuses what does not fit before anything is written
        return replace(
            settings,
            batch=config.batch_size,
            input_size=config.data.train_size,
            epochs=config.epochs,
            precision=config.precision,
        )
    return replace(
        settings,
        batch=settings.batch or _BATCH[device],
        rounds=settings.rounds or _ROUNDS,
        input_size=settings.input_size or _SIZE[device],
    )


@dataclass(frozen=True)
class Row:
    """A network of the table."""

    backbone: str  # name of an architecture or a baseline
    form: Form

    @property
    def name(self) -> str:
        """Key in cells."""
        return f"{self.backbone}, {self.form}"

    @property
    def title(self) -> str:
        """As the paper prints it: "RepVGG-B2-fast"."""
        title = title_of(self.backbone)
        return {"normal": title, "fast": f"{title}-fast"}.get(self.form, f"{title}, {self.form}")

    @property
    def printed(self) -> PrintedSegmentation | None:
        """The row of the paper, for the two forms that it has."""
        return next((row for row in TABLE_8 if (row.backbone, _form_of(row)) == (self.backbone, self.form)), None)


#: What the paper compares (§4.3).
_CLAIMS = (
    (Row("repvgg_b1g2", "fast"), Row("resnet50", "normal")),
    (Row("repvgg_b1g2", "fast"), Row("resnet101", "normal")),
    (Row("repvgg_b2", "fast"), Row("resnet101", "normal")),
)


def _form_of(row: PrintedSegmentation) -> Form:
    return "fast" if row.is_fast else "normal"


def rows_of(backbones: Sequence[str]) -> list[Row]:
    """Return the networks of the table: every form of the RepVGGs, and the ResNets, dilated and by phases."""
    ours = [Row(backbone, form) for backbone in backbones for form in _FORMS]
    return ours + [Row(backbone, form) for backbone in _BASELINES for form in _RESNET_FORMS]


def build(row: Row) -> nn.Module:
    """Return the plain form of a network with random weights, in eval mode.

    "stride 32" has no dilation and the strides of a classifier. "undilated" has the feature maps of stride 8, and so
    the arithmetic of the others, with dilation 1: it shows what dilation costs. "fast" and "normal" are the paper's,
    and "by phases" computes what "normal" does by :func:`repvgg.dilate_by_phases`.
    """
    rule: Literal["fast", "paper"] = "fast" if row.form == "fast" else "paper"
    spec = PSPNetSpec(row.name, row.backbone, rule, output_stride=32 if row.form == "stride 32" else 8)
    model = create_model(spec, CITYSCAPES_CLASSES, plain=True).eval()
    if row.form == "undilated":
        for part in model.backbone.modules():
            if isinstance(part, nn.Conv2d) and part.dilation != (1, 1):
                part.dilation = (1, 1)
                part.padding = tuple((size - 1) // 2 for size in part.kernel_size)
    return dilate_by_phases(model)[0] if row.form == "by phases" else model


def _count(row: Row, size: int) -> dict[str, int]:
    # On phases, a layer has as many multiply-adds as the undilated one, and as many for which Winograd applies.
    with meta_device():  # shapes are enough to count
        counted = build(replace(row, form="undilated") if row.form == "by phases" else row)
    counts = count(counted, (1, 3, size, size))
    return {"params": counts.params, "macs": counts.macs, "winograd_muls": counts.winograd_muls}


def _measure(settings: SegmentationSettings, store: CellStore, reporter: ProgressReporter) -> None:
    if settings.train:
        train_missing(settings.training, store, reporter)
        return
    rows, size = rows_of(settings.backbones), settings.input_size or TABLE_8_SIZE
    if COUNTS not in store:  # first, because it takes seconds and the timing minutes
        store.put(COUNTS, {row.name: _count(row, size) for row in rows})

    def make(row: Row) -> nn.Module:
        model = build(row)
        ENGINES[settings.engine].check(model, (3, size, size))
        return model

    candidates = {
        row.name: Candidate(row.name, row.backbone, PLAIN, partial(make, row), (3, size, size), settings.engine)
        for row in rows
    }
    weights = sum(counts["params"] for counts in store[COUNTS].values())
    groups = [list(candidates)]
    if not fit_together(weights, settings.run):
        resnets = [row.name for row in rows if row.backbone in _BASELINES]
        groups = [[*resnets, *(row.name for row in rows if row.backbone == one)] for one in settings.backbones]
    protocol = replace(INTERLEAVED, rounds=settings.rounds or _ROUNDS)
    measure_candidates(groups, candidates, store, settings.run, protocol, settings.batch or 1, reporter)


def _outcome(settings: SegmentationSettings, values: Mapping[str, Cell]) -> Outcome:
    if settings.train:
        return training_outcome(settings.training, values)
    rows, speeds = rows_of(settings.backbones), Speeds.from_cells(values, settings.batch or 1)
    pairs = _pairs(settings.backbones)
    tables = (_speed_table(settings, rows, speeds, values.get(COUNTS, {})), _pair_table(pairs, speeds))
    return Outcome(_lead(settings.backbones, speeds), tables, (_pair_chart(pairs, speeds), _speed_chart(rows, speeds)))


def _lead(backbones: Sequence[str], speeds: Speeds) -> str:
    parts = []
    for backbone in backbones:
        normal, phases, fast = (
            speeds.speedup(Row(backbone, form).name, Row(backbone, "undilated").name)
            for form in ("normal", "by phases", "fast")
        )
        if normal and phases and fast:
            parts.append(
                f"{title_of(backbone)} runs at {normal:.2f} times the speed of undilated layers when dilated, at "
                f"{fast:.2f} times with five dilated layers, and at {phases:.2f} times by phases"
            )
    return "; ".join(parts) + "." if parts else "Nothing was measured yet."


def _speed_table(settings: SegmentationSettings, rows: Sequence[Row], speeds: Speeds, counts: Cell) -> Table:
    columns = (
        Column("model", "Backbone"),
        Column("paper_miou_percent", "mIoU, paper (%)", 2),
        Column("paper_pixel_accuracy_percent", "Pixel acc., paper (%)", 2),
        Column("paper_images_per_second", "Speed, paper (images/s)", 1),
        *(replace(column, digits=3) for column in SPEED_COLUMNS),
        Column("paper_speed_up", "× ResNet-50, paper", 2),
        Column("speed_up", "× ResNet-50 here", 2),
        Column("params_millions", "Params (M)", 2),
        Column("flops_billions", "Theo FLOPs (B)", 1),
        Column("winograd_muls_billions", "Wino MULs (B)", 1),
    )
    baseline = Row("resnet50", "normal")
    body: list[tuple[Value, ...]] = []
    for row in rows:
        printed, counted = row.printed, counts.get(row.name)
        paper = (
            (printed.miou_percent, printed.pixel_accuracy_percent, printed.images_per_second)
            if printed
            else (None, None, None)
        )
        body.append(
            (
                row.title,
                *paper,
                *speeds.cells(row.name),
                _paper_ratio(row, baseline),
                speeds.speedup(row.name, baseline.name),
                *(
                    (counted["params"] / 1e6, counted["macs"] / 1e9, counted["winograd_muls"] / 1e9)
                    if counted
                    else (None, None, None)
                ),
            )
        )
    notes = (
        f"{speeds.extent} Images of {settings.input_size}x{settings.input_size}, engine {settings.engine}. Paper: "
        f"{TABLE_8_SIZE}x{TABLE_8_SIZE}, {TABLE_8_BATCH} images a call, GTX 1080 Ti.",
        "Accuracies are the paper's, on Cityscapes; nothing is trained for this table. Parameters and arithmetic are "
        "counted here, in the plain form, for one image of the size that is timed; the paper prints none.",
        'The paper has the rows "-fast" and those without a suffix. "stride 32" has no dilation and coarser feature '
        'maps; "undilated" has the arithmetic of the dilated rows with dilation 1, which is another function; "by '
        'phases" is the same function as the row without a suffix.',
    )
    return Table("table8", "Speed and size, next to the paper's", columns, tuple(body), notes)


def _paper_ratio(one: Row, other: Row) -> float | None:
    if one.printed is None or other.printed is None:
        return None
    return one.printed.images_per_second / other.printed.images_per_second


def _pairs(backbones: Sequence[str]) -> list[tuple[Row, Row]]:
    """Return what is compared: the forms of each backbone with the dilated one, and the claims of the paper."""
    forms: tuple[Form, ...] = ("fast", "by phases", "undilated", "stride 32")
    ours = [(Row(one, form), Row(one, "normal")) for one in backbones for form in forms]
    claims = [(one, other) for one, other in _CLAIMS if one.backbone in backbones]
    return ours + [(Row(one, "by phases"), Row(one, "normal")) for one in _BASELINES] + claims


def _pair_table(pairs: Sequence[tuple[Row, Row]], speeds: Speeds) -> Table:
    columns = (Column("model", "Network"), Column("compared_with", "compared with"), *RATIO_COLUMNS)
    body = tuple(
        (one.title, other.title, _paper_ratio(one, other), *speeds.ratio_cells(one.name, other.name))
        for one, other in pairs
    )
    return Table("table8-pairs", "What dilation costs, and the comparisons of the paper", columns, body)


def _pair_chart(pairs: Sequence[tuple[Row, Row]], speeds: Speeds) -> Chart:
    # Without "stride 32", whose long bars would hide the others.
    bars = [
        Bar(f"{one.title}\nvs {other.title}", speeds.speedup(one.name, other.name), _paper_ratio(one, other))
        for one, other in pairs
        if one.form != "stride 32"
    ]
    draw = partial(draw_bars, title="How many times as fast?", unit="times as fast", bars=bars, line_at=1.0)
    return Chart("table8-pairs", "Speed of each form next to that of the dilated one, here and in the paper", draw)


def _speed_chart(rows: Sequence[Row], speeds: Speeds) -> Chart:
    bars = []
    for row in rows:
        speed = speeds.images_per_second(row.name)
        text = speed if isinstance(speed, str) else "not measured" if speed is None else f"{speed:,.2f}"
        length = None if isinstance(speed, str) else speed
        bars.append(Bar(row.title, length, text=text, ours=row.backbone not in _BASELINES))
    draw = partial(draw_bars, title="Speed on this machine", unit="images per second", bars=bars)
    return Chart("table8-speed", "Images per second of each network on this machine", draw)


def _missing(settings: SegmentationSettings, store: CellStore) -> str:
    return missing_trainings(settings.training, store) if settings.train else ""


STUDIES = (
    Study(
        name="table8",
        title="Table 8: semantic segmentation with PSPNet",
        about=(
            "PSPNets with 19 classes over RepVGG and ResNet, all in the plain form with random weights, since speed "
            "does not depend on them. All networks are timed interleaved: every round times each of them once. Speeds "
            "are medians over the rounds, and ratios are computed within rounds, so that a slow phase of the machine "
            "cancels.\n\n"
            "With --train, small networks (pspnet_small_repvgg_a0, pspnet_small_resnet18) are trained on images with "
            "masks by the recipe pspnet-small instead: undilated, dilated by each rule, and the ResNet, with every "
            "seed. Each network is collapsed, and both forms predict every validation image. A cell is one training; "
            "the same command continues after an interruption, and several processes may share the folder."
        ),
        settings=SegmentationSettings,
        resolve=_resolve,
        measure=_measure,
        outcome=_outcome,
        missing=_missing,
        default_folder=lambda settings: "table8-train" if settings.train else "table8",
    ),
)
