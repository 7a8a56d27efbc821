"""The folder of a run: who may write there, and what is left in it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from repvgg import models
from repvgg._files import write_text
from repvgg.checkpoints import Metadata, save_checkpoint
from repvgg.collapse import reparameterize
from repvgg.data import OpenedData
from repvgg.errors import OutputError, OutputExistsError, UsageError
from repvgg.training.callbacks import EpochRecord
from repvgg.training.config import TrainConfig
from repvgg.training.config_file import differences, read_config, write_config
from repvgg.training.curve import CSV, PICTURE, draw_curve, write_log
from repvgg.training.evaluation import Evaluation
from repvgg.training.fitting import FitResult, judged
from repvgg.training.job import TENSORBOARD
from repvgg.training.saving import LAST
from repvgg.verify import Evidence, verify

CONFIG, TRAIN_FILE, PLAIN_FILE, BEST_FILE, REPORT = (
    "config.yaml",
    "train.safetensors",
    "plain.safetensors",
    "best.safetensors",
    "report.json",
)
_FREE = {"data.workers", "dry_run", "save_steps", "devices", "nodes", "device_batch"}  # may change when a run goes on
_OURS = (LAST, TRAIN_FILE, PLAIN_FILE, BEST_FILE, REPORT, CSV, PICTURE)
_UNFINISHED = ".repvgg-*"  # what a process that was killed while it wrote leaves
_BATCH, _JUDGED = 64, 4  # images, batches


def goes_on(folder: Path, config: TrainConfig, *, resume: bool, overwrite: bool, writes: bool = True) -> bool:
    """Whether there is a run in the folder to go on with; if not, whether one may begin there is checked.

    Args:
        folder: of the run.
        config: the run.
        resume: one that is there goes on.
        overwrite: one that is there may be removed.
        writes: whether this process is the one that writes; the others may see already what it has written.

    Raises:
        OutputExistsError: something is there, and neither ``resume`` nor ``overwrite`` is set.
        OutputError: the folder cannot be looked into.
        UsageError: the run that is there is another one.
    """
    if resume and overwrite:
        raise UsageError("A run either goes on or begins anew: ask to resume it, or to overwrite it.")
    if resume and (folder / CONFIG).exists():
        _check_same(folder, config)
        return (folder / LAST).exists()
    if writes and not overwrite and _is_taken(folder):
        raise OutputExistsError(f"{str(folder)!r} exists: resume it, choose another folder, or ask to overwrite it.")
    return False


def _is_taken(folder: Path) -> bool:
    try:
        return folder.exists() and any(not path.match(_UNFINISHED) for path in folder.iterdir())
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be looked into: {error.strerror or error}.") from error


def _check_same(folder: Path, config: TrainConfig) -> None:
    for name, (before, now) in differences(read_config(folder / CONFIG), config).items():
        if name not in _FREE:
            raise UsageError(f"The run in {str(folder)!r} has {name} {before!r}, not {now!r}: take another folder.")


def take(folder: Path, config: TrainConfig, *, going_on: bool) -> None:
    """Make the folder ready for a run: without what killed processes left half written, and with its config.

    Raises:
        OutputError: it cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*folder.glob(_UNFINISHED), *([] if going_on else [folder / TENSORBOARD])):
            shutil.rmtree(path, ignore_errors=True)
        for name in () if going_on else _OURS:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be made: {error.strerror or error}.") from error
    if not going_on:
        write_config(folder / CONFIG, config, overwrite=True)


@final
@dataclass(frozen=True, eq=False)
class RunFolder:
    """What a run leaves in its folder, epoch by epoch and at the end.

    Attributes:
        path: the folder.
        config: the run.
        data: what it trains on.
        model: what it trains.
    """

    path: Path
    config: TrainConfig
    data: OpenedData
    model: models.RepVGG

    def keep_epoch(self, history: Sequence[EpochRecord], weights: Mapping[str, Tensor]) -> None:
        """Write the log and the curve, and the ``weights`` if they are the best so far."""
        write_log(self.path, history)
        draw_curve(self.path, history, f"{self.model.spec.name}, {self.config.recipe}, {self.data.uri}")
        last = history[-1]
        if all(last.held_out_accuracy > record.held_out_accuracy for record in history[:-1]):
            metrics = {"held_out_accuracy": last.held_out_accuracy, "epoch": float(last.epoch)}
            save_checkpoint(self.path / BEST_FILE, weights, self._about(self.model, metrics), overwrite=True)

    def finish(self, result: FitResult) -> tuple[Evaluation, Evidence] | None:
        """Collapse the trained model, verify and judge that, and write both forms and the report.

        Returns:
            The plain form on the held-out images, and that it is equal; None where the model was plain already.

        Raises:
            EquivalenceError: it is not equal.
        """
        self._save(self.model, result.held_out)
        plain = None if models.form_of(self.model) == "plain" else self._collapse()
        self._write_report(result, plain[0] if plain else None)
        return plain

    def _collapse(self) -> tuple[Evaluation, Evidence]:
        plain, _ = reparameterize(self.model, torch.zeros(1, *self.data.test_shape))
        assert isinstance(plain, models.RepVGG)
        batches = [self.data.prepare(images) for images, _ in islice(_held_out(self.data), _JUDGED)]
        evidence = verify(self.model, plain, batches).raise_if_failed()
        result = judged(plain, self.data, self.config)
        self._save(plain, result)
        return result, evidence

    def _save(self, model: models.RepVGG, result: Evaluation) -> None:
        about = self._about(model, {"held_out_accuracy": result.accuracy, "held_out_top5": result.top(5)})
        models.save(self.path / (PLAIN_FILE if about.form == "plain" else TRAIN_FILE), model, about, overwrite=True)

    def _about(self, model: models.RepVGG, metrics: dict[str, float]) -> Metadata:
        """The header of a checkpoint of this run."""
        return models.describe_model(
            model,
            models.form_of(model),
            input_size=self.data.test_shape[1],
            mean=self.data.mean,
            std=self.data.std,
            classes=self.data.classes,
            recipe=asdict(self.config),
            metrics=metrics,
            ema=self.config.ema > 0,
        )

    def _write_report(self, result: FitResult, plain: Evaluation | None) -> None:
        report = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "config": asdict(self.config),
            "classes": self.data.classes,
            "train_form": result.held_out.to_dict(),
            "plain_form": None if plain is None else plain.to_dict(),
            "seconds": result.seconds,
            "history": [asdict(record) for record in result.history],
            "skipped_images": self.data.bad.count,
        }
        write_text(self.path / REPORT, json.dumps(report, indent=1), overwrite=True)


def _held_out(data: OpenedData) -> Iterable[tuple[Tensor, Tensor]]:
    return data.held_out_batches(_BATCH)
