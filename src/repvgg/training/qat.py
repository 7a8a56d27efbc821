"""Quantization-aware training in a run: the network from a config, the phases of its epochs, and its files."""

from __future__ import annotations

from itertools import islice
from typing import Any, final

import lightning as L
from torch import nn

from repvgg.quantization import QatNetwork, QatReport, prepare_qat
from repvgg.training.config import TrainConfig
from repvgg.training.tasks import TrainingData

_CALIBRATION_BATCH = 32
_STEPS_PER_OBSERVATION = 8  # the search for the range of a batch takes as long as a small layer does


def build_qat_network(model: nn.Module, data: TrainingData, config: TrainConfig) -> tuple[QatNetwork, QatReport]:
    """Return the network that trains ``model``, a trained one, with the integers of its plain form.

    Raises:
        UsageError: see :func:`repvgg.quantization.prepare_qat`.
    """
    wanted = config.qat.calibration_images
    size = min(_CALIBRATION_BATCH, wanted)
    batches = islice(data.train_batches(size), -(-wanted // size))
    images = [data.prepare(images) for images, _ in batches]
    return prepare_qat(model, images, config.qat.settings, learn_ranges=config.qat.learn_ranges)


@final
class QatSchedule(L.Callback):
    """Let ranges follow the batches at the beginning of a run, and freeze them afterwards.

    What a step does is a function of its number, so that a resumed run does the same.
    """

    def __init__(self, network: QatNetwork, config: TrainConfig) -> None:
        self._network, self._config = network, config

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if 0 < trainer.current_epoch <= self._config.qat.observe_epochs:  # at epoch 0 they are new
            self._network.search_weight_clips()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        qat, step = self._config.qat, trainer.global_step
        steps_per_epoch = trainer.estimated_stepping_batches / self._config.epochs
        observes = not qat.learn_ranges and step % _STEPS_PER_OBSERVATION == 0
        self._network.observe(observes and step < qat.observe_epochs * steps_per_epoch)
