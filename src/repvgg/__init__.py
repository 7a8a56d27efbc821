"""RepVGG: train multi-branch networks, ship plain ones, and know that they are equal.

The public door: everything here is stable, typed and documented; the rest of the package is not. Importing it needs
torch alone. ``repvgg.engine`` is a door of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from repvgg.verify import Evidence, verify  # at once: a room has the name of its function

if TYPE_CHECKING:
    from repvgg import engine as engine
    from repvgg.algebra import ConvMap
    from repvgg.collapse import ModelSummary, Report, fold_batch_norms, is_plain, model_summary, reparameterize
    from repvgg.expansion import ExpandReport, expand, insert_bn, replace_convs
    from repvgg.models import ModelSpec, RepVGG, create_model, from_pretrained, list_models, load, push_to_hub
    from repvgg.symbolic import equivalent_conv
    from repvgg.symbolic.trace import trace  # from where it stands: its room holds a module of that name

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

_ROOMS = {
    "algebra": ("ConvMap",),
    "collapse": ("ModelSummary", "Report", "fold_batch_norms", "is_plain", "model_summary", "reparameterize"),
    "expansion": ("ExpandReport", "expand", "insert_bn", "replace_convs"),
    "models": ("ModelSpec", "RepVGG", "create_model", "from_pretrained", "list_models", "load", "push_to_hub"),
    "symbolic": ("equivalent_conv", "trace"),
}
_MODULES = ("engine",)  # doors of their own
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Open the room that a name stands in when it is asked for first: importing them all takes a tenth of a second."""
    if name in _MODULES:
        return import_module(f"repvgg.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"repvgg.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names of the door."""
    return sorted({*globals(), *__all__, *_MODULES})
