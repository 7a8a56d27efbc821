"""The symbolic forward: torch functions as algebra, one short handler each, in one table."""

import repvgg.symbolic.handlers
import repvgg.symbolic.slicing  # noqa: F401 - enters its handlers in the table
from repvgg.symbolic.probe import ChannelProbe, ChannelsFound, channels_of
from repvgg.symbolic.shadow import fingerprint, shadow_of, things_in
from repvgg.symbolic.tensor import HANDLERS, Source, SymbolicTensor, dispatch, handles
from repvgg.symbolic.trace import (
    EquivalentConv,
    algebra_device,
    equivalent_conv,
    first_float,
    guarded,
    refuse_training,
    run,
    trace,
    unchanged_by_call,
)

__all__ = [
    "HANDLERS",
    "ChannelProbe",
    "ChannelsFound",
    "EquivalentConv",
    "Source",
    "SymbolicTensor",
    "algebra_device",
    "channels_of",
    "dispatch",
    "equivalent_conv",
    "fingerprint",
    "first_float",
    "guarded",
    "handles",
    "refuse_training",
    "run",
    "shadow_of",
    "things_in",
    "trace",
    "unchanged_by_call",
]
