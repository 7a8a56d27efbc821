"""``run``: a training run with its folder of config, checkpoints, log, learning curve and report."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from torch import Tensor, nn

from repvgg import models
from repvgg._files import atomic_write, write_text
from repvgg._serde import to_json
from repvgg.checkpoints import Metadata, save_checkpoint
from repvgg.collapse import reparameterize
from repvgg.data import ImageData, SegmentationData, open_data
from repvgg.errors import OutputError, OutputExistsError, UsageError, printable, require
from repvgg.quantization import QatNetwork, save_quantized
from repvgg.training.checkpoint import LAST_CHECKPOINT
from repvgg.training.config import TrainConfig, differences, read_config, write_config
from repvgg.training.distributed import process_layout
from repvgg.training.dry_run import perform_dry_run
from repvgg.training.initial_model import InitialModel, build_initial_model
from repvgg.training.loop import TENSORBOARD_FOLDER, FitResult, TrainingJob, evaluate_validation, fit, on_device_of
from repvgg.training.optim import describe_groups, optimizer_groups
from repvgg.training.precision import settle_precision
from repvgg.training.qat import build_qat_network
from repvgg.training.records import EpochRecord, Record, SegmentationRecord
from repvgg.training.samples import SAMPLES_FOLDER, SampleCollector, write_samples
from repvgg.training.segmentation_collapse import CollapsedSegmentation, collapse_segmentation
from repvgg.training.segmentation_evaluation import MaskAgreement, compare_segmentations
from repvgg.training.tasks import TrainingData, ValidationResult, palette_of, validation_batch
from repvgg.verify import Evidence, verify

CONFIG_FILE = "config.yaml"
TRAIN_FILE, PLAIN_FILE, BEST_FILE = "train.safetensors", "plain.safetensors", "best.safetensors"
REPORT_FILE, LOG_FILE, CURVE_FILE = "report.json", "log.csv", "curve.png"
INT8_FILE = "int8.safetensors"  # of quantization-aware training
PAGE_FILE, INT8_ONNX_FILE = "report.html", "int8.onnx"  # written by the command line
_RUN_FILES = (
    PAGE_FILE,
    INT8_FILE,
    INT8_ONNX_FILE,
    LAST_CHECKPOINT,
    TRAIN_FILE,
    PLAIN_FILE,
    BEST_FILE,
    REPORT_FILE,
    LOG_FILE,
    CURVE_FILE,
)
_TEMPORARY = ".repvgg-*"  # left by a process that was killed while it wrote a file
# Config fields that do not decide the weights, and may differ when a run resumes.
_CHANGEABLE = ("data.workers", "data.allow_commands", "dry_run", "save_steps", "devices", "nodes", "device_batch")
_VERIFY_BATCH, _VERIFY_BATCHES = 64, 4


@final
@dataclass(frozen=True, eq=False)
class RunResult:
    """The outcome of :func:`run`."""

    folder: Path  # the folder with all files of the run
    fit: FitResult  # the training
    plain: (
        ValidationResult | None
    )  # the plain form on the validation images; None where the trained model was plain already
    network: QatNetwork | None = None  # that simulates the integers, after quantization-aware training


def run(
    config: TrainConfig, folder: Path, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> RunResult | None:
    """Train as ``config`` says, collapse the result, and write everything to ``folder``.

    ``config.yaml`` repeats the run; ``last.ckpt`` resumes it; ``train.safetensors`` and ``plain.safetensors`` are the
    model of the last epoch in both forms, ``best.safetensors`` that of the epoch with the highest validation accuracy;
    after quantization-aware training ``int8.safetensors`` has the integers of the plain form;
    ``log.csv`` and ``curve.png`` are updated after every epoch, as are TensorBoard's files where it is installed.

    Args:
        config: the run.
        folder: created if it does not exist.
        resume: continue from ``last.ckpt``, or start if there is none; the config must be that of the saved run.
        overwrite: start again in a folder that holds a run.
        console: where progress is printed; standard output if None.

    Returns:
        The outcome on rank 0, None on all other processes.

    Raises:
        OutputExistsError: ``folder`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        UsageError: the run to resume had another config.
        RepvggError: see :func:`repvgg.training.fit` and :func:`repvgg.data.open_data`.
    """
    if config.qat.enabled and config.init is None:
        raise UsageError("Quantization-aware training starts from a trained checkpoint: give one as init.")
    layout = process_layout(config)
    is_writer = layout.rank == 0
    console = (console or Console()) if is_writer else Console(quiet=True)
    if resume and config.precision == "auto" and (folder / CONFIG_FILE).exists():
        config = replace(config, precision=read_config(folder / CONFIG_FILE).precision)  # of the machine it began on
    config, precision_notes = settle_precision(config)
    # Refused before the data set is opened, which may take minutes.
    resuming = check_folder(folder, config, resume=resume, overwrite=overwrite, is_writer=is_writer)
    data = open_data(config.data, seed=config.seed)
    initial = build_initial_model(config, data)
    model: nn.Module = initial.model
    if config.qat.enabled:
        model, report = build_qat_network(initial.model, data, config)
        train_form: Any = model.train_form
        initial = InitialModel(train_form, (*initial.notes, *str(report).splitlines()))
    job = TrainingJob(model, data, config, layout)  # refuses what does not fit before anything is written
    _print_setup(job, initial, precision_notes, console)
    if resuming:
        _print(console, f"  resumes from {folder / LAST_CHECKPOINT}")
    elif config.dry_run:
        _print(console, f"  {perform_dry_run(model, data, config)}")
    if is_writer:
        # Only now: a run that is refused, or fails its dry run, leaves the folder as it was.
        prepare_folder(folder, config, resuming=resuming)
    run_folder = RunFolder(folder, config, data, initial.model)
    result = fit(
        model,
        data,
        config,
        folder=folder,
        resume=resuming,
        console=console,
        layout=layout,
        on_epoch=run_folder.write_epoch,
    )
    network = model if isinstance(model, QatNetwork) else None
    return _finish(run_folder, result, console, network) if is_writer else None


def check_folder(folder: Path, config: TrainConfig, *, resume: bool, overwrite: bool, is_writer: bool = True) -> bool:
    """Check that a run may start or continue in ``folder``, and return whether it resumes from a checkpoint there.

    Processes that are not ``is_writer`` may already see what the writer has created.

    Raises:
        OutputExistsError: the folder is not empty, and neither ``resume`` nor ``overwrite`` is set.
        OutputError: the folder cannot be listed.
        UsageError: the run that is there has another config.
    """
    if resume and overwrite:
        raise UsageError("A run is either resumed or started again: set only one of resume and overwrite.")
    if resume and (folder / CONFIG_FILE).exists():  # the first file of a run; a checkpoint may not exist yet
        for name, (before, now) in differences(read_config(folder / CONFIG_FILE), config).items():
            if name not in _CHANGEABLE:
                raise UsageError(
                    f"The run in {str(folder)!r} has {name} {before!r}, not {now!r}: choose another folder."
                )
        return (folder / LAST_CHECKPOINT).exists()
    try:
        occupied = folder.exists() and any(not path.match(_TEMPORARY) for path in folder.iterdir())
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be listed: {error.strerror or error}.") from error
    if is_writer and occupied and not overwrite:
        raise OutputExistsError(f"{str(folder)!r} exists: add --resume or --overwrite, or choose another folder.")
    return False


def prepare_folder(folder: Path, config: TrainConfig, *, resuming: bool) -> None:
    """Create the folder, or remove the temporary files of killed processes; for a new run, old results too.

    Raises:
        OutputError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [] if resuming else [folder / TENSORBOARD_FOLDER, folder / SAMPLES_FOLDER]
        for path in (*folder.glob(_TEMPORARY), *old):
            shutil.rmtree(path, ignore_errors=True)
        for name in () if resuming else _RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be created: {error.strerror or error}.") from error
    if not resuming:
        # The first file: a folder with a config is a run that can be resumed, from the beginning if need be.
        write_config(folder / CONFIG_FILE, config, overwrite=True)


@final
@dataclass(frozen=True, eq=False)
class CollapsedRun:
    """The plain form of a trained model."""

    validation: ValidationResult  # on the validation images
    evidence: Evidence  # of its equality to the train form
    agreement: MaskAgreement | None = None  # in how many pixels both predict the same class; None without masks


@final
@dataclass(frozen=True, eq=False)
class RunFolder:
    """Writes the files of a run after each epoch and at the end."""

    path: Path  # the folder
    config: TrainConfig  # the run
    data: TrainingData  # the training and validation images
    model: models.Model  # the model being trained

    def write_epoch(self, history: Sequence[Record], weights: Mapping[str, Tensor]) -> None:
        """Write log and curve, and ``weights`` as the best checkpoint if no earlier epoch had as high a score."""
        write_log(self.path, history)
        draw_curve(self.path, history, f"{self.model.spec.name}, {self.config.recipe}, {self.data.uri}")
        last = history[-1]
        # Strictly greater: of equally accurate epochs the first one stays.
        if all(last.score > record.score for record in history[:-1]):
            # The metric names of version 0.1.0: programs read them from checkpoint headers.
            name = "held_out_miou" if isinstance(last, SegmentationRecord) else "held_out_accuracy"
            metrics = {name: last.score, "epoch": float(last.epoch)}
            save_checkpoint(self.path / BEST_FILE, weights, self._metadata(self.model, metrics), overwrite=True)

    def finish(self, result: FitResult, network: QatNetwork | None = None) -> CollapsedRun | None:
        """Write the trained model, collapse it, verify and evaluate the plain form, and write that and the report.

        Args:
            result: of the training.
            network: what was trained, with :attr:`model` as its train form; None where that was trained itself. Its
                integers are written too, and ``result`` is theirs.

        Returns:
            The plain form; None where the model was plain already.

        Raises:
            EquivalenceError: the plain form is not equal to the trained model.
        """
        validation, integers = result.validation, None
        if network is not None:
            integers, validation = validation, evaluate_validation(self.model, self.data, self.config)
            save_quantized(self.path / INT8_FILE, network.to_integers(), overwrite=True)
        self._save(self.model, validation)
        is_plain = models.form_of(self.model) == "plain"
        about_masks: dict[str, Any] = {}
        if isinstance(self.data, SegmentationData):
            collapsed, about_masks = self._finish_segmentation(self.data, is_plain)
        else:
            collapsed = None if is_plain else self._collapse(self.data)
        # Last of all: a folder with a report is complete.
        report = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "config": asdict(self.config),
            "classes": self.data.classes,
            "train_form": validation.to_dict(),
            "plain_form": None if collapsed is None else collapsed.validation.to_dict(),
            "evidence": None if collapsed is None else collapsed.evidence.to_dict(),
            "seconds": result.seconds,
            "history": [asdict(record) for record in result.history],
            "skipped_images": self.data.corrupt.count,
            **({} if integers is None else {"int8": integers.to_dict()}),
            **about_masks,
        }
        write_text(self.path / REPORT_FILE, to_json(report), overwrite=True)
        return collapsed

    def _collapse(self, data: ImageData) -> CollapsedRun:
        plain, _ = reparameterize(self.model, torch.zeros(1, *data.test_shape))
        assert isinstance(plain, models.RepVGG)
        batches = islice(data.val_batches(_VERIFY_BATCH), _VERIFY_BATCHES)
        images = [data.prepare(images) for images, _ in batches]
        evidence = verify(self.model, plain, images).raise_if_failed()
        result = evaluate_validation(plain, data, self.config)
        self._save(plain, result)
        return CollapsedRun(result, evidence)

    def _finish_segmentation(
        self, data: SegmentationData, is_plain: bool
    ) -> tuple[CollapsedRun | None, dict[str, Any]]:
        """Collapse the model and count in how many pixels both forms agree; return that, and what a report adds."""
        collector = SampleCollector(data.num_val, data.to_pixels)
        collapsed: CollapsedSegmentation | None = None
        if is_plain:
            with on_device_of(self.config, self.model):
                compare_segmentations(
                    [self.model],
                    data.val_batches(validation_batch(data)),
                    data.prepare,
                    num_classes=len(data.classes),
                    ignore_index=data.ignore_index,
                    on_batch=collector.add,
                )
        else:
            assert isinstance(self.model, models.PSPNet)
            collapsed = collapse_segmentation(self.model, data, self.config, collector.add)
        about = {
            "task": "segmentation",
            "palette": palette_of(data),
            "ignore_index": data.ignore_index,
            "mask_agreement": None if collapsed is None else asdict(collapsed.agreement),
            "samples": write_samples(self.path / SAMPLES_FOLDER, collector.samples, palette_of(data)),
        }
        if collapsed is None:
            return None, about
        self._save(collapsed.model, collapsed.plain)
        return CollapsedRun(collapsed.plain, collapsed.evidence, collapsed.agreement), about

    def _save(self, model: models.Model, result: ValidationResult) -> None:
        metadata = self._metadata(model, result.metrics)
        name = PLAIN_FILE if metadata.form == "plain" else TRAIN_FILE
        models.save(self.path / name, model, metadata, overwrite=True)

    def _metadata(self, model: models.Model, metrics: dict[str, float]) -> Metadata:
        has_masks = isinstance(self.data, SegmentationData)
        return models.describe_model(
            model,
            models.form_of(model),
            # Whole images have any size: that of the crops says at which one the network was trained.
            input_size=(self.data.input_shape if has_masks else self.data.test_shape)[1],
            mean=self.data.mean,
            std=self.data.std,
            classes=self.data.classes,
            recipe=asdict(self.config),
            metrics=metrics,
            ema=self.config.ema > 0,
            palette=palette_of(self.data) if isinstance(self.data, SegmentationData) else (),
        )


def write_log(folder: Path, history: Sequence[Record]) -> Path:
    """Write ``log.csv`` atomically, one line per epoch."""
    text = io.StringIO()
    # csv ends lines with \r\n by default, which shows as ^M in a terminal.
    kind = type(history[0]) if history else EpochRecord
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in history)
    return write_text(folder / LOG_FILE, text.getvalue(), overwrite=True)


def draw_curve(folder: Path, history: Sequence[Record], title: str) -> Path:
    """Draw ``curve.png``: both losses, accuracy or mIoU, and learning rate over the epochs, one below the other."""
    # Figure and canvas without pyplot: no global state, no backend that needs a screen, safe in any thread.
    canvas = require("matplotlib.backends.backend_agg", "train").FigureCanvasAgg
    figure = require("matplotlib.figure", "train").Figure(figsize=(8, 7), layout="constrained")
    locator = require("matplotlib.ticker", "train").MaxNLocator
    canvas(figure)
    figure.suptitle(title, x=0.01, ha="left")
    epochs = [record.epoch for record in history]
    best = max(history, key=lambda record: record.score)
    losses, accuracies, rates = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 1))
    style = {"marker": "o", "markersize": 3}  # a run of one epoch is a point
    losses.plot(epochs, [record.loss for record in history], color="tab:orange", label="training", **style)
    losses.plot(
        epochs, [record.held_out_loss for record in history], color="tab:blue", label="validation", ls="--", **style
    )
    losses.set_ylabel("loss")
    # Above the axes, as the numbers below: nothing is written over a line.
    losses.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    accuracies.plot(epochs, [100 * record.score for record in history], color="tab:blue", **style)
    accuracies.set_ylabel(f"validation {best.score_name} (%)")
    accuracies.set_title(f"best {best.score:.2%}, after epoch {best.epoch}", loc="right", size="medium")
    rates.plot(epochs, [record.lr for record in history], color="tab:gray", **style)
    rates.set(xlabel="epoch", ylabel="learning rate")
    rates.xaxis.set_major_locator(locator(integer=True, min_n_ticks=1))  # there is no epoch 2.5
    for axes in (losses, accuracies, rates):
        axes.grid(alpha=0.3)
    with atomic_write(folder / CURVE_FILE, overwrite=True) as part:
        figure.savefig(part, dpi=120, format="png")
    return folder / CURVE_FILE


def _print(console: Console, line: str) -> None:
    """Print a line without changes: not wrapped, highlighted or parsed as markup."""
    console.print(printable(line), highlight=False, soft_wrap=True, markup=False)


def _print_setup(job: TrainingJob, initial: InitialModel, notes: Sequence[str], console: Console) -> None:
    """Print everything that decides the outcome of the run."""
    data, config = job.data, job.config
    shape = "x".join(map(str, data.input_shape))
    train, validation = ("a stream of" if n is None else f"{n:,}" for n in (data.num_train, data.num_val))
    lines = (
        *initial.notes,
        *data.notes,
        *notes,
        f"{job.plan}, {config.epochs} epochs, {_schedule(config)}decay policy {config.optim.decay!r}",
        *describe_groups(optimizer_groups(job.model, config.optim), job.plan.lr),
    )
    images = f"{train} training images of {shape} in {len(data.classes)} classes, {validation} validation images"
    _print(console, f"Train {initial.model.spec.name} on {data.uri}: {images}")
    for line in lines:
        _print(console, f"  {line}")


def _schedule(config: TrainConfig) -> str:
    schedule = "" if config.optim.schedule == "cosine" else f"{config.optim.schedule} schedule, "
    sizes = "".join(f"{scale:g} of the size up to {share:.0%} of the steps, " for share, scale in config.progressive)
    return schedule + sizes


def _finish(run_folder: RunFolder, result: FitResult, console: Console, network: QatNetwork | None) -> RunResult:
    collapsed = run_folder.finish(result, network)
    # After quantization-aware training the validation is that of the integers, and the plain form has float weights.
    name = "int8" if network is not None else "train form" if collapsed else "model"
    forms = {name: result.validation}
    if collapsed is not None:
        forms["plain form"], evidence = collapsed.validation, collapsed.evidence
        error = f"relative error {evidence.relative:.1e} (tolerance {evidence.tolerance:.1e})"
        _print(console, f"  plain form: {error}")
    for name, one in forms.items():
        _print(console, f"  {name:10}  {one.summary}")
    if collapsed is not None and collapsed.agreement is not None:
        _print(console, f"  train form and plain form: {collapsed.agreement}")
    bad = run_folder.data.corrupt
    if bad.count:
        _print(console, f"  skipped {bad.count} corrupt images, the first of them {': '.join(bad.first(1)[0])}")
    _print(console, f"  wrote {run_folder.path}")
    return RunResult(run_folder.path, result, collapsed.validation if collapsed else None, network)
