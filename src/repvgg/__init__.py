"""Structural re-parameterization: train multi-branch networks, convert them exactly into plain ones, and verify it.

This module and ``repvgg.engine`` are the public API: stable, typed and documented; other modules may change. Importing
it needs torch only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from repvgg.verify import Evidence, verify  # eager, because the package and the function share a name

if TYPE_CHECKING:
    from repvgg import engine as engine
    from repvgg.algebra import ConvMap
    from repvgg.collapse import ModelSummary, Report, fold_batch_norms, is_plain, model_summary, reparameterize
    from repvgg.expansion import ExpandReport, expand, insert_bn, replace_convs
    from repvgg.models import ModelSpec, RepVGG, create_model, from_pretrained, list_models, load, push_to_hub
    from repvgg.symbolic import equivalent_conv
    from repvgg.symbolic.trace import trace  # not from the package, which has a module of that name

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
    "from_pretrained",
    "insert_bn",
    "is_plain",
    "list_models",
    "load",
    "model_summary",
    "push_to_hub",
    "reparameterize",
    "replace_convs",
    "trace",
    "verify",
]

#: The package that defines each name. Packages are imported on first use: importing all of them takes 0.1 s.
_PACKAGE_OF = {
    **dict.fromkeys(("ConvMap",), "algebra"),
    **dict.fromkeys(
        ("ModelSummary", "Report", "fold_batch_norms", "is_plain", "model_summary", "reparameterize"), "collapse"
    ),
    **dict.fromkeys(("ExpandReport", "expand", "insert_bn", "replace_convs"), "expansion"),
    **dict.fromkeys(
        ("ModelSpec", "RepVGG", "create_model", "from_pretrained", "list_models", "load", "push_to_hub"), "models"
    ),
    **dict.fromkeys(("equivalent_conv", "trace"), "symbolic"),
}
_SUBPACKAGES = ("engine",)  # public packages, reached as attributes


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"repvgg.{name}")
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"repvgg.{_PACKAGE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
