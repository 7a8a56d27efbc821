"""Any model in, plain model out: capture, linear regions, what pays, rewrite, report."""

from repvgg.collapse.api import fold_batch_norms, is_plain, reparameterize, unwrapped
from repvgg.collapse.report import Folded, LeftAlone, Part, Report

__all__ = ["Folded", "LeftAlone", "Part", "Report", "fold_batch_norms", "is_plain", "reparameterize", "unwrapped"]
