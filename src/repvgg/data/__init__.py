"""Data: images by URI, what is drawn for them, and loaders that give the same batches however they are run.

Configs come at once; sources, loaders and transforms are loaded on first use, since PIL and torchvision take longer
to import than all the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repvgg.data.augment import AffineJitter
from repvgg.data.config import Augment, DataConfig

if TYPE_CHECKING:
    from repvgg.data.bad import BadImages
    from repvgg.data.checking import CheckReport, check_data
    from repvgg.data.loading import HeldOutLoader, TrainLoader
    from repvgg.data.opening import OpenedData, open_data

_ON_FIRST_USE = {
    "BadImages": "bad",
    "CheckReport": "checking",
    "HeldOutLoader": "loading",
    "OpenedData": "opening",
    "TrainLoader": "loading",
    "check_data": "checking",
    "open_data": "opening",
}

__all__ = [
    "AffineJitter",
    "Augment",
    "BadImages",
    "CheckReport",
    "DataConfig",
    "HeldOutLoader",
    "OpenedData",
    "TrainLoader",
    "check_data",
    "open_data",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(f"repvgg.data.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
