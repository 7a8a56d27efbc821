"""What runs a network while it is timed.

An engine takes a model and a setting and returns what takes images. PyTorch is the only one so far; another is a
function and a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from repvgg.measure import Setting

Run: TypeAlias = Callable[[Tensor], object]
Engine: TypeAlias = Callable[[nn.Module, Setting], Run]


def run_in_torch(model: nn.Module, setting: Setting) -> Run:
    """The model itself, moved where the setting says, and compiled if it says so."""
    return setting.place(model)


ENGINES: dict[str, Engine] = {"torch": run_in_torch}
