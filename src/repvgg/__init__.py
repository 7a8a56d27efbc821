"""RepVGG: train multi-branch networks, ship plain ones, and know that they are equal.

The public door: everything here is stable, typed and documented; the rest of the package is not. Importing it needs
torch alone.
"""

from __future__ import annotations

from repvgg.algebra import ConvMap
from repvgg.collapse import ModelSummary, Report, fold_batch_norms, is_plain, model_summary, reparameterize
from repvgg.expansion import ExpandReport, expand, insert_bn
from repvgg.models import ModelSpec, RepVGG, create_model, list_models, load
from repvgg.symbolic import equivalent_conv, trace
from repvgg.verify import Evidence, verify

__version__ = "0.1.0"

__all__ = [
    "ConvMap",
    "Evidence",
    "ExpandReport",
    "ModelSpec",
    "ModelSummary",
    "RepVGG",
    "Report",
    "create_model",
    "equivalent_conv",
    "expand",
    "fold_batch_norms",
    "insert_bn",
    "is_plain",
    "list_models",
    "load",
    "model_summary",
    "reparameterize",
    "trace",
    "verify",
]
