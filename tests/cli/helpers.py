"""What the tests of the command line share."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a call of the command line."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Files:
    """Checkpoints of one model in both forms; tests do not write to them."""

    train: Path
    plain: Path
    model: nn.Module


def contents(folder):
    """Digest of each file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }
