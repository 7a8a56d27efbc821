"""One cell of a study that trains: a network trained, judged, collapsed, and judged again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg import __version__
from repvgg.collapse import Report, reparameterize
from repvgg.data import ImageData
from repvgg.errors import NothingFoldedWarning, OtherBlockWarning, OutputError
from repvgg.measure import environment
from repvgg.measure.memory import track_peak_memory
from repvgg.models import ModelSpec, RepVGG, form_of
from repvgg.studies.cells import Cell
from repvgg.studies.contenders import Contender
from repvgg.training import (
    LAST_CHECKPOINT,
    EpochRecord,
    Evaluation,
    TrainConfig,
    evaluate_validation,
    fit,
    seeded,
    write_log,
)
from repvgg.verify import verify

_BATCH, _JUDGED = 64, 4  # images, batches


@dataclass(frozen=True, eq=False)
class Training:
    """What a cell needs.

    Attributes:
        contender: who is trained.
        spec: the row of models that it is built on.
        config: the run; its seed is that of the cell.
        data: what is learned and what is judged by, opened with that seed.
    """

    contender: Contender
    spec: ModelSpec
    config: TrainConfig
    data: ImageData


def train_cell(training: Training, folder: Path) -> Cell:
    """Train in a folder, from its last checkpoint if it holds one; return what came out, and leave the log there.

    Raises:
        RepvggError: see :func:`repvgg.training.fit`.
        EquivalenceError: the collapsed network is not equal to the trained one.
        Terminated: SIGTERM came, and the run has saved where it stands.
    """
    _make(folder)
    data, config = training.data, training.config
    model, remarks = _built(training)

    def log(history: Sequence[EpochRecord], weights: Mapping[str, Tensor]) -> None:
        write_log(folder, history)

    with track_peak_memory(config.accelerator) as peak:
        result = fit(model, data, config, folder=folder, resume=True, progress=False, on_epoch=log)
    outcome: dict[str, Any] = {
        "row": training.contender.name,
        "seed": config.seed,
        "trained": _figures(result.validation),
        "deployed": _deployed(model, result.validation, training),
        "loss": result.history[-1].loss,
        "epochs": len(result.history),
        "seconds": sum(record.seconds for record in result.history),
        "images_per_second": _mean([record.images_per_second for record in result.history]),
        "peak_bytes": peak(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "version": __version__,
        "environment": environment(),
        "remarks": remarks,
    }
    (folder / LAST_CHECKPOINT).unlink(missing_ok=True)  # the result says it all
    return outcome


def _built(training: Training) -> tuple[nn.Module, list[str]]:
    """The network with the first weights of its seed, and what its builder warns of."""
    with warnings.catch_warnings(record=True) as caught, seeded("model", training.config.seed):
        warnings.simplefilter("always", OtherBlockWarning)
        data = training.data
        model = training.contender.make(training.spec, len(data.classes), data.input_shape[0])
    return model, [str(warning.message) for warning in caught]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be made: {error.strerror or error}.") from error


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figures(result: Evaluation) -> dict[str, Any]:
    return {"correct": result.correct, "images": len(result.labels), "top1_percent": 100 * result.accuracy}


def _deployed(model: nn.Module, trained: Evaluation, training: Training) -> dict[str, Any]:
    """The network as it would be shipped, whether it is one convolution a layer, and how equal it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        plain, report = reparameterize(model, torch.zeros(1, *training.data.test_shape))
    result = evaluate_validation(plain, training.data, training.config)
    same = int((result.predictions == trained.predictions).sum())
    batches = islice(training.data.val_batches(_BATCH), _JUDGED)
    images = [training.data.prepare(images) for images, _ in batches]
    evidence = verify(model, plain, images).raise_if_failed()
    return {
        **_figures(result),
        "same_answers": same,
        "relative_error": evidence.relative,
        "tolerance": evidence.tolerance,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "is_plain": isinstance(plain, RepVGG) and form_of(plain) == "plain",
        "left": _why(report),
    }


def _why(report: Report) -> str:
    """Why the network is not one convolution a layer; empty where nothing was in the way."""
    return next((row.reason for row in report.left), "")
