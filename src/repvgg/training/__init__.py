"""Training: recipes that return a complete config, and Lightning to run them.

Configs, recipes and parameter groups are imported at once. What needs Lightning and torchmetrics (the extra ``train``)
is imported on first use: they take seconds, and a help text needs neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repvgg._contexts import seeded
from repvgg.data.segmentation_metrics import SegmentationEvaluation
from repvgg.errors import require
from repvgg.training.config import DecayPolicy, OptimConfig, Precision, TrainConfig, read_config, to_yaml, write_config
from repvgg.training.distributed import BatchPlan, ProcessLayout, SyncBatchNorm, plan_batches, process_layout
from repvgg.training.evaluation import Evaluation, evaluate
from repvgg.training.optim import (
    RepOptimizer,
    equivalent_l2,
    learning_rate_factor,
    merge_constant_scale_branches,
    parameter_groups,
)
from repvgg.training.precision import ChosenPrecision, fastest_precision, settle_precision
from repvgg.training.recipes import RECIPES, quickstart, recipe_of
from repvgg.training.records import EpochRecord, SegmentationRecord
from repvgg.training.segmentation_evaluation import (
    MaskAgreement,
    compare_segmentations,
    evaluate_segmentation,
)
from repvgg.training.segmentation_inference import MULTI_SCALE, SegmentationInference

if TYPE_CHECKING:
    from repvgg.training.checkpoint import LAST_CHECKPOINT, Terminated
    from repvgg.training.dry_run import DryRunResult, perform_dry_run
    from repvgg.training.initial_model import build_initial_model
    from repvgg.training.loop import FitResult, evaluate_validation, fit
    from repvgg.training.run_folder import CONFIG_FILE, RunResult, run, write_log
    from repvgg.training.segmentation_collapse import collapse_segmentation
    from repvgg.training.segmentation_task import SegmentationTask, segmentation_loss
    from repvgg.training.task import ClassificationTask, classification_loss

_LIGHTNING_MODULES = {
    "CONFIG_FILE": "run_folder",
    "ClassificationTask": "task",
    "DryRunResult": "dry_run",
    "FitResult": "loop",
    "LAST_CHECKPOINT": "checkpoint",
    "RunResult": "run_folder",
    "SegmentationTask": "segmentation_task",
    "Terminated": "checkpoint",
    "build_initial_model": "initial_model",
    "classification_loss": "task",
    "collapse_segmentation": "segmentation_collapse",
    "evaluate_validation": "loop",
    "fit": "loop",
    "perform_dry_run": "dry_run",
    "run": "run_folder",
    "segmentation_loss": "segmentation_task",
    "write_log": "run_folder",
}

# Names of version 0.1.0, kept so that code written for it still works.
_FORMER_NAMES = {
    "Layout": "ProcessLayout",
    "Trial": "DryRunResult",
    "layout_of": "process_layout",
    "try_out": "perform_dry_run",
    "without_branches": "merge_constant_scale_branches",
}

__all__ = [
    "CONFIG_FILE",
    "LAST_CHECKPOINT",
    "MULTI_SCALE",
    "RECIPES",
    "BatchPlan",
    "ChosenPrecision",
    "ClassificationTask",
    "DecayPolicy",
    "DryRunResult",
    "EpochRecord",
    "Evaluation",
    "FitResult",
    "MaskAgreement",
    "OptimConfig",
    "Precision",
    "ProcessLayout",
    "RepOptimizer",
    "RunResult",
    "SegmentationEvaluation",
    "SegmentationInference",
    "SegmentationRecord",
    "SegmentationTask",
    "SyncBatchNorm",
    "Terminated",
    "TrainConfig",
    "build_initial_model",
    "classification_loss",
    "collapse_segmentation",
    "compare_segmentations",
    "equivalent_l2",
    "evaluate",
    "evaluate_segmentation",
    "evaluate_validation",
    "fastest_precision",
    "fit",
    "learning_rate_factor",
    "merge_constant_scale_branches",
    "parameter_groups",
    "perform_dry_run",
    "plan_batches",
    "process_layout",
    "quickstart",
    "read_config",
    "recipe_of",
    "run",
    "seeded",
    "segmentation_loss",
    "settle_precision",
    "to_yaml",
    "write_config",
    "write_log",
]


def __getattr__(name: str) -> Any:
    if name in _FORMER_NAMES:
        return getattr(importlib.import_module(__name__), _FORMER_NAMES[name])  # may be a lazy name itself
    if name not in _LIGHTNING_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Before the module is imported: its own import statements would raise a bare ImportError.
    for package in ("lightning", "torchmetrics"):
        require(package, "train")
    return getattr(importlib.import_module(f"repvgg.training.{_LIGHTNING_MODULES[name]}"), name)
