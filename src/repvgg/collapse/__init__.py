"""Any model in, plain model out: capture, find linear regions, decide what pays, rewrite, verify, report."""

from repvgg.collapse.api import ModelSummary, fold_batch_norms, is_plain, model_summary, reparameterize
from repvgg.collapse.cost import Cost
from repvgg.collapse.modules import unwrapped
from repvgg.collapse.report import Folded, Part, Report, Skipped

__all__ = [
    "Cost",
    "Folded",
    "ModelSummary",
    "Part",
    "Report",
    "Skipped",
    "fold_batch_norms",
    "is_plain",
    "model_summary",
    "reparameterize",
    "unwrapped",
]
