"""A run with a folder: what ``repvgg train`` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from torch import Tensor

from repvgg import models
from repvgg.checkpoints import Form, Metadata, save_checkpoint
from repvgg.collapse import is_plain, reparameterize
from repvgg.data import OpenedData, open_data
from repvgg.errors import OutputError, OutputExistsError, UsageError
from repvgg.files import write_text
from repvgg.training.callbacks import EpochRecord
from repvgg.training.config import TrainConfig
from repvgg.training.config_file import differences, read_config, write_config
from repvgg.training.curve import CSV, PICTURE, draw_curve, write_log
from repvgg.training.decay import describe_groups
from repvgg.training.evaluation import Evaluation
from repvgg.training.fitting import FitResult, fit, judged
from repvgg.training.optim import optimizer_groups
from repvgg.training.plan import Layout, layout_of, plan_batches
from repvgg.training.saving import LAST
from repvgg.training.starting import Start, starting_model
from repvgg.training.trial import try_out
from repvgg.verify import verify

CONFIG, TRAIN_FILE, PLAIN_FILE, BEST_FILE, REPORT = (
    "config.yaml",
    "train.safetensors",
    "plain.safetensors",
    "best.safetensors",
    "report.json",
)
_FREE = {"data.workers", "dry_run", "save_steps", "devices", "nodes", "device_batch"}  # may change when a run goes on
_OURS = (LAST, TRAIN_FILE, PLAIN_FILE, BEST_FILE, REPORT, CSV, PICTURE)
_JUDGED = 4  # batches


@final
@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run left.

    Attributes:
        folder: with everything in it.
        fit: the training.
        plain: the plain form on the held-out images; None where the trained model was plain already.
    """

    folder: Path
    fit: FitResult
    plain: Evaluation | None


def run(
    config: TrainConfig, folder: Path, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> RunResult | None:
    """Train as ``config`` says and leave a folder with the models, the log, the curve and the config.

    ``config.yaml`` repeats the run; ``last.ckpt`` lets it go on; ``train.safetensors`` and ``plain.safetensors`` are
    the model of the last epoch in both forms, ``best.safetensors`` that of the epoch with the highest held-out
    accuracy; ``log.csv`` and ``curve.png`` follow every epoch, TensorBoard's files too where it is installed.

    Args:
        config: the run.
        folder: where all of that goes; made if it does not exist.
        resume: go on from ``last.ckpt``, or begin if there is none; the config must be the one that is saved there.
        overwrite: begin anew in a folder that holds a run.
        console: where to tell what happens; standard output if None.

    Returns:
        What came out; None on all processes but the first.

    Raises:
        OutputExistsError: ``folder`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        UsageError: the run that is to go on was another one.
        RepvggError: see :func:`repvgg.training.fit` and :func:`repvgg.data.open_data`.
    """
    layout = layout_of(config)
    console = console or Console(quiet=layout.rank > 0)
    going_on = _claim(folder, config, resume, overwrite, layout)
    data = open_data(config.data, seed=config.seed)
    start = starting_model(config, data)
    _introduce(config, data, start, layout, console)
    if config.dry_run and not going_on:
        console.print(f"  {try_out(start.model, data, config)}", highlight=False, soft_wrap=True)
    if going_on:
        console.print(f"  goes on from {folder / LAST}", highlight=False, soft_wrap=True)
    keeper = _Keeper(config, folder, data, start.model)
    result = fit(
        start.model, data, config, folder=folder, resume=going_on, console=console, layout=layout, on_epoch=keeper
    )
    if layout.rank:
        return None
    return _finish(config, folder, data, start.model, result, console)


def _claim(folder: Path, config: TrainConfig, resume: bool, overwrite: bool, layout: Layout) -> bool:
    """Make the folder, or check what is in it; whether a run goes on there."""
    saved = folder / CONFIG
    if saved.exists() and resume:
        changed = {name: pair for name, pair in differences(read_config(saved), config).items() if name not in _FREE}
        if changed:
            name, (before, now) = next(iter(changed.items()))
            raise UsageError(f"The run in {str(folder)!r} has {name} {before!r}, not {now!r}: take another folder.")
        return (folder / LAST).exists()
    if layout.rank == 0:
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise OutputExistsError(
                f"{str(folder)!r} exists: resume it, choose another folder, or ask to overwrite it."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in _OURS:
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{str(folder)!r} cannot be made: {error.strerror or error}.") from error
        write_config(saved, config, overwrite=True)
    return False


def _introduce(config: TrainConfig, data: OpenedData, start: Start, layout: Layout, console: Console) -> None:
    """Say everything that decides the outcome."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    shape = "x".join(map(str, data.input_shape))
    console.print(
        f"[bold]Train[/] {start.model.spec.name} on {data.uri}: {_count(data.num_train)} images of {shape} in "
        f"{len(data.classes)} classes, judged by {_count(data.num_held_out)} others",
        highlight=False,
        soft_wrap=True,
    )
    for note in (*start.notes, *data.notes):
        say(f"  {note}")
    plan = plan_batches(config, layout.world_size)
    say(f"  {plan}, {config.epochs} epochs, decay policy {config.optim.decay!r}")
    for line in describe_groups(optimizer_groups(start.model, config.optim)):
        say(f"  {line}")


def _count(number: int | None) -> str:
    return "a stream of" if number is None else f"{number:,}"


class _Keeper:
    """After each epoch: the log, the curve, and the best model so far."""

    def __init__(self, config: TrainConfig, folder: Path, data: OpenedData, model: models.RepVGG) -> None:
        self._config, self._folder, self._data, self._model = config, folder, data, model

    def __call__(self, history: Sequence[EpochRecord], weights: Mapping[str, Tensor]) -> None:
        write_log(self._folder, history)
        draw_curve(self._folder, history, f"{self._model.spec.name}, {self._config.recipe}, {self._data.uri}")
        last = history[-1]
        if all(last.held_out_accuracy > record.held_out_accuracy for record in history[:-1]):
            metrics = {"held_out_accuracy": last.held_out_accuracy, "epoch": float(last.epoch)}
            about = describe(self._config, self._data, self._model, metrics)
            save_checkpoint(self._folder / BEST_FILE, weights, about, overwrite=True)


def describe(
    config: TrainConfig, data: OpenedData, model: models.RepVGG, metrics: dict[str, float], form: Form | None = None
) -> Metadata:
    """The header of a checkpoint of this run."""
    return models.describe_model(
        model,
        form or ("plain" if is_plain(model) else "train"),
        input_size=data.test_shape[1],
        mean=data.mean,
        std=data.std,
        classes=data.classes,
        recipe=asdict(config),
        metrics=metrics,
        ema=config.ema > 0,
    )


def _finish(
    config: TrainConfig, folder: Path, data: OpenedData, model: models.RepVGG, result: FitResult, console: Console
) -> RunResult:
    """Collapse, verify on held-out images, evaluate both forms, and write them."""
    metrics = {"held_out_accuracy": result.accuracy, "held_out_top5": result.held_out.top(5)}
    about = describe(config, data, model, metrics)
    models.save(folder / TRAIN_FILE if about.form == "train" else folder / PLAIN_FILE, model, about, overwrite=True)
    plain_result = None
    if about.form == "train":
        plain, _ = reparameterize(model, torch.zeros(1, *data.test_shape))
        assert isinstance(plain, models.RepVGG)
        batches = [data.prepare(images) for images, _ in _first(data.held_out_batches(64), _JUDGED)]
        evidence = verify(model, plain, batches).raise_if_failed()
        plain_result = judged(plain, data, config)
        metrics = {"held_out_accuracy": plain_result.accuracy, "held_out_top5": plain_result.top(5)}
        models.save(folder / PLAIN_FILE, plain, describe(config, data, plain, metrics, "plain"), overwrite=True)
        console.print(
            f"  plain form: relative error {evidence.relative:.1e}, {evidence.tolerance:.1e} allowed",
            highlight=False,
            soft_wrap=True,
        )
    _write_report(folder, config, data, result, plain_result)
    for name, one in (("train form" if plain_result else "model", result.held_out), ("plain form", plain_result)):
        if one is not None:
            console.print(f"  {name:10}  top-1 {one.accuracy:.2%}  top-5 {one.top(5):.2%}  {one}", highlight=False)
    if data.bad.count:
        console.print(f"  {data.bad.count} broken images were skipped, first {data.bad.first(1)[0]}", highlight=False)
    console.print(f"  wrote {folder}", highlight=False, soft_wrap=True)
    return RunResult(folder, result, plain_result)


def _first(batches: Any, count: int) -> list[tuple[Tensor, Tensor]]:
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def _write_report(
    folder: Path, config: TrainConfig, data: OpenedData, result: FitResult, plain: Evaluation | None
) -> None:
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "config": asdict(config),
        "classes": data.classes,
        "train_form": _numbers(result.held_out),
        "plain_form": None if plain is None else _numbers(plain),
        "seconds": result.seconds,
        "history": [asdict(record) for record in result.history],
        "skipped_images": data.bad.count,
    }
    write_text(folder / REPORT, json.dumps(report, indent=1), overwrite=True)


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "top1": evaluation.accuracy,
        "top5": evaluation.top(5),
        "macro_accuracy": evaluation.macro_accuracy,
        "correct": evaluation.correct,
        "images": len(evaluation.labels),
        "confusion": evaluation.confusion.tolist(),
    }
