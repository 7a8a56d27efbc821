"""The exponential moving average of the weights, which is then what is judged and kept."""

from __future__ import annotations

from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


@final
class MovingAverage(WeightAveraging):
    """``average ← d_n · average + (1 − d_n) · weights`` after each step n, batch norm statistics too.

    ``d_n = min(decay, (1 + n) / (10 + n))``: the first steps, far from the last weights, are forgotten faster.
    Lightning takes the average for validation, and leaves it in the model at the end.

    Args:
        decay: in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=self._update)
        self.decay = decay

    @torch.no_grad()
    def _update(self, averages: list[Tensor], weights: list[Tensor], steps: Tensor | int) -> None:
        n = int(steps)
        move = 1 - min(self.decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point():  # torch hands over one type at a time
            torch._foreach_lerp_(averages, weights, move)
        else:
            torch._foreach_copy_(averages, weights)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> Any:
        """After every step of the optimizer."""
        return step_idx is not None

    def hand_over(self, task: L.LightningModule) -> None:
        """Leave the averages in ``task``; Lightning does so as training ends, but not where it had ended before."""
        self._copy_average_to_current(task)

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The averages so far by name, those whose names start with ``prefix``, without it."""
        assert self._average_model is not None
        state = self._average_model.module.state_dict()
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
