"""What convolutions put out on data, and whether a batch norm follows them already."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.expansion.sites import Site
from repvgg.expansion.statistics import ChannelStatistics, Data, run_on, watching


class Outputs:
    """What one convolution puts out."""

    def __init__(self) -> None:
        self.statistics = ChannelStatistics()
        self.last: weakref.ref[Any] | None = None
        self.followed = False
        self.is_image = True

    def add(self, y_NCHW: Any) -> None:
        """Count one outcome."""
        self.is_image = self.is_image and isinstance(y_NCHW, Tensor) and y_NCHW.dim() == 4
        if self.is_image:
            self.statistics.add(y_NCHW)
            self.last = weakref.ref(y_NCHW)

    def look(self, x: Any) -> None:
        """Notice that what goes into a batch norm is the last outcome itself."""
        self.followed = self.followed or (self.last is not None and self.last() is x)

    @property
    def refusal(self) -> str | None:
        """Why no batch norm can follow."""
        if self.followed:
            return "a batch norm follows it already"
        if not self.is_image:
            return "it does not put out images (N, C, H, W)"
        return None if self.statistics.count else "the data never reaches it"


def seen_behind(model: nn.Module, sites: Iterable[Site], data: Data) -> dict[Site, Outputs]:
    """What the convolutions put out while ``model`` runs on ``data`` in eval mode."""
    found = {site: Outputs() for site in sites}
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]

    def look(_: nn.Module, x: Tensor) -> None:
        for outputs in found.values():
            outputs.look(x)

    handles = [
        site.conv.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.add(y))
        for site, outputs in found.items()
    ]
    try:
        with watching(norms, look):
            run_on(model, data)
    finally:
        for handle in handles:
            handle.remove()
    return found
