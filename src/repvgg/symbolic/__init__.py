"""The symbolic forward: torch functions as algebra, each implemented by one short handler."""

import repvgg.symbolic.reshaping
import repvgg.symbolic.slicing  # noqa: F401 - both register handlers in HANDLERS
from repvgg.symbolic.layout import IMAGES, ROWS, SEQUENCES, VECTORS, VOLUMES, Arrangement, Layout, UnknownSize
from repvgg.symbolic.probe import InputSpec, channels_of, guarded
from repvgg.symbolic.shadow import shadow_of, things_in
from repvgg.symbolic.tensor import ITEM_ASSIGNMENTS, Source, SymbolicTensor, assign_item
from repvgg.symbolic.trace import (
    EquivalentConv,
    algebra_device,
    check_eval_mode,
    equivalent_conv,
    first_float,
    trace,
    unchanged_by_call,
)

__all__ = [
    "IMAGES",
    "ITEM_ASSIGNMENTS",
    "ROWS",
    "SEQUENCES",
    "VECTORS",
    "VOLUMES",
    "Arrangement",
    "EquivalentConv",
    "InputSpec",
    "Layout",
    "Source",
    "SymbolicTensor",
    "UnknownSize",
    "algebra_device",
    "assign_item",
    "channels_of",
    "check_eval_mode",
    "equivalent_conv",
    "first_float",
    "guarded",
    "shadow_of",
    "things_in",
    "trace",
    "unchanged_by_call",
]
