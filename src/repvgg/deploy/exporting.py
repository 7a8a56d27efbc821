"""What the exporters share."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
from torch import Tensor, nn

from repvgg.errors import UsageError


def check_image_shape(shape: tuple[int, int, int]) -> None:
    """Raise UsageError if that is not the shape of an image."""
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"The shape of an image is (C, H, W), three positive numbers, not {shape}.")


def example_input(model: nn.Module, input_shape: tuple[int, int, int], batch: int) -> Tensor:
    """An input in the dtype and on the device of the model."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch, *input_shape, dtype=like.dtype, device=like.device)


@contextmanager
def silence() -> Iterator[None]:
    """Hold back what the exporter says about its own internals: its outcome is checked instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
