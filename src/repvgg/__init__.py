"""Structural re-parameterization: train multi-branch networks, convert them exactly into plain ones, and verify it.

This module and ``repvgg.engine`` are the public API: stable, typed and documented; other modules may change. Importing
it imports nothing else: every name, and every package such as ``repvgg.training``, is imported on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repvgg import algebra as algebra
    from repvgg import blocks as blocks
    from repvgg import checkpoints as checkpoints
    from repvgg import collapse as collapse
    from repvgg import data as data
    from repvgg import deploy as deploy
    from repvgg import engine as engine
    from repvgg import errors as errors
    from repvgg import expansion as expansion
    from repvgg import measure as measure
    from repvgg import models as models
    from repvgg import quantization as quantization
    from repvgg import studies as studies
    from repvgg import symbolic as symbolic
    from repvgg import training as training
    from repvgg.algebra import ConvMap
    from repvgg.collapse import ModelSummary, Report, fold_batch_norms, is_plain, model_summary, reparameterize
    from repvgg.expansion import ExpandReport, expand, insert_bn, replace_convs
    from repvgg.models import (
        ModelSpec,
        RepVGG,
        create_model,
        dilate_by_phases,
        from_pretrained,
        list_models,
        load,
        push_to_hub,
    )
    from repvgg.quantization import QuantizationSettings, quantize
    from repvgg.symbolic import equivalent_conv
    from repvgg.symbolic.trace import trace  # not from the package, which has a module of that name
    from repvgg.verify import Evidence, verify

__version__ = "0.1.0"

__all__ = [
    "ConvMap",
    "Evidence",
    "ExpandReport",
    "ModelSpec",
    "ModelSummary",
    "QuantizationSettings",
    "RepVGG",
    "Report",
    "create_model",
    "dilate_by_phases",
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
    "quantize",
    "reparameterize",
    "replace_convs",
    "trace",
    "verify",
]

#: The package that defines each name. torch and these packages take seconds to import.
_PACKAGE_OF = {
    **dict.fromkeys(("ConvMap",), "algebra"),
    **dict.fromkeys(
        ("ModelSummary", "Report", "fold_batch_norms", "is_plain", "model_summary", "reparameterize"), "collapse"
    ),
    **dict.fromkeys(("ExpandReport", "expand", "insert_bn", "replace_convs"), "expansion"),
    **dict.fromkeys(
        (
            "ModelSpec",
            "RepVGG",
            "create_model",
            "dilate_by_phases",
            "from_pretrained",
            "list_models",
            "load",
            "push_to_hub",
        ),
        "models",
    ),
    **dict.fromkeys(("QuantizationSettings", "quantize"), "quantization"),
    **dict.fromkeys(("equivalent_conv", "trace"), "symbolic"),
    **dict.fromkeys(("Evidence", "verify"), "verify"),
}
#: Packages and modules that the documentation uses as attributes, such as repvgg.training.RepOptimizer.
_DOCUMENTED_MODULES = ("blocks", "data", "engine", "errors", "training")
_OTHER_MODULES = (
    *(
        "algebra",
        "checkpoints",
        "collapse",
        "deploy",
        "expansion",
        "measure",
        "models",
        "quantization",
        "studies",
        "symbolic",
    ),
)


def __getattr__(name: str) -> Any:
    if name in (*_DOCUMENTED_MODULES, *_OTHER_MODULES):
        return import_module(f"repvgg.{name}")
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"repvgg.{_PACKAGE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(["__version__", *__all__, *_DOCUMENTED_MODULES])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing the package repvgg.verify binds it to the name of its function, which is the public one.
        if name == "verify" and isinstance(value, ModuleType):
            value = value.verify
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
