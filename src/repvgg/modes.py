"""A model in eval mode, or PyTorch with other threads: for a while, and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """Every module of ``models`` in eval mode; each comes back in the mode it had, after an error too.

    By the flags alone: modules made by ``torch.export`` refuse ``eval()``. What is no ``nn.Module`` has no mode.
    """
    modules = {part: part.training for model in models if isinstance(model, nn.Module) for part in model.modules()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """PyTorch with ``number`` threads for one operation; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
