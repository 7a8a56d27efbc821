"""Training: recipes that return a complete config, and Lightning as the engine.

Configs, recipes and optimizer come at once; what needs Lightning is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repvgg.training.config import OptimConfig, TrainConfig
from repvgg.training.evaluation import Evaluation, evaluate
from repvgg.training.optim import learning_rate_factor, parameter_groups
from repvgg.training.recipes import quickstart
from repvgg.training.seeding import seeded

if TYPE_CHECKING:
    from repvgg.training.callbacks import EpochRecord
    from repvgg.training.fitting import FitResult, fit
    from repvgg.training.task import ClassificationTask, classification_loss

_NEEDS_LIGHTNING = {
    "ClassificationTask": "task",
    "EpochRecord": "callbacks",
    "FitResult": "fitting",
    "classification_loss": "task",
    "fit": "fitting",
}

__all__ = [
    "ClassificationTask",
    "EpochRecord",
    "Evaluation",
    "FitResult",
    "OptimConfig",
    "TrainConfig",
    "classification_loss",
    "evaluate",
    "fit",
    "learning_rate_factor",
    "parameter_groups",
    "quickstart",
    "seeded",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_LIGHTNING:
        return getattr(importlib.import_module(f"repvgg.training.{_NEEDS_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
