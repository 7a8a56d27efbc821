"""The exponential moving average of the weights, which is then what is judged and kept."""

from __future__ import annotations

from typing import Any, final

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


@final
class MovingAverage(WeightAveraging):  # type: ignore[misc]  # Lightning carries no types here
    """``average ← d_n · average + (1 − d_n) · weights`` after each step n, batch norm statistics too.

    ``d_n = min(decay, (1 + n) / (10 + n))``: the first steps, far from the last weights, are forgotten faster. Lightning
    takes the average for validation, and leaves it in the model at the end.

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
        pairs = list(zip(averages, weights, strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([a for a, _ in moved], [w for _, w in moved], move)
        for average, weight in pairs:
            if not average.is_floating_point():
                average.copy_(weight)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> Any:
        """After every step of the optimizer."""
        return step_idx is not None

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The averages so far by name, those whose names start with ``prefix``, without it."""
        assert self._average_model is not None
        state = self._average_model.module.state_dict()
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
