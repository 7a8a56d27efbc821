"""Training: recipes that return a complete config, and Lightning as the engine.

Configs, recipes and optimizer come at once; what needs Lightning is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repvgg.training.config import DecayPolicy, OptimConfig, Precision, TrainConfig
from repvgg.training.config_file import read_config, to_yaml, write_config
from repvgg.training.decay import parameter_groups
from repvgg.training.evaluation import Evaluation, evaluate
from repvgg.training.optim import learning_rate_factor
from repvgg.training.plan import BatchPlan, Layout, layout_of, plan_batches
from repvgg.training.recipes import RECIPES, quickstart, recipe_of
from repvgg.training.regularizer import equivalent_l2
from repvgg.training.seeding import seeded

if TYPE_CHECKING:
    from repvgg.training.callbacks import EpochRecord
    from repvgg.training.fitting import FitResult, fit
    from repvgg.training.rep_optimizer import RepOptimizer, without_branches
    from repvgg.training.runs import RunResult, run
    from repvgg.training.saving import Terminated
    from repvgg.training.sync_bn import SyncBatchNorm
    from repvgg.training.task import ClassificationTask, classification_loss
    from repvgg.training.trial import Trial, try_out

_ON_FIRST_USE = {
    "ClassificationTask": "task",
    "EpochRecord": "callbacks",
    "FitResult": "fitting",
    "RepOptimizer": "rep_optimizer",
    "RunResult": "runs",
    "SyncBatchNorm": "sync_bn",
    "Terminated": "saving",
    "Trial": "trial",
    "classification_loss": "task",
    "fit": "fitting",
    "run": "runs",
    "try_out": "trial",
    "without_branches": "rep_optimizer",
}

__all__ = [
    "RECIPES",
    "BatchPlan",
    "ClassificationTask",
    "DecayPolicy",
    "EpochRecord",
    "Evaluation",
    "FitResult",
    "Layout",
    "OptimConfig",
    "Precision",
    "RepOptimizer",
    "RunResult",
    "SyncBatchNorm",
    "Terminated",
    "TrainConfig",
    "Trial",
    "classification_loss",
    "equivalent_l2",
    "evaluate",
    "fit",
    "layout_of",
    "learning_rate_factor",
    "parameter_groups",
    "plan_batches",
    "quickstart",
    "read_config",
    "recipe_of",
    "run",
    "seeded",
    "to_yaml",
    "try_out",
    "without_branches",
    "write_config",
]


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return getattr(importlib.import_module(f"repvgg.training.{_ON_FIRST_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
