"""Any model in, plain model out: capture, linear regions, what pays, rewrite, report."""

from repvgg.collapse.api import ModelSummary, fold_batch_norms, is_plain, model_summary, reparameterize, unwrapped
from repvgg.collapse.cost import Cost
from repvgg.collapse.report import Folded, LeftAlone, Part, Report

__all__ = [
    "Cost",
    "Folded",
    "LeftAlone",
    "ModelSummary",
    "Part",
    "Report",
    "fold_batch_norms",
    "is_plain",
    "model_summary",
    "reparameterize",
    "unwrapped",
]
