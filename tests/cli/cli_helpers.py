"""What the tests of the command line share."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line returned and printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Files:
    """Checkpoints of one model in both forms; nobody writes to them."""

    train: Path
    plain: Path
    model: nn.Module


def contents(folder):
    """Digest of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def trained_like(model, seed=0):
    """Statistics and parameters of batch norms that training could have left; the model is in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -1, 1),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()
