"""Products in Winograd's domain, place by place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.ir import Function, Index, Value
from repvgg.engine.kernels.late import LateProducts
from repvgg.engine.kernels.panel import Lanes, Operand, Panel
from repvgg.engine.kernels.runs import run_length
from repvgg.engine.kernels.tiling import Share


@final
@dataclass(frozen=True)
class Products:
    """(tile, input channel) by (input channel, output channel), place by place.

    Kernels lie as (place, input channel, output channel), or if they are transformed late as
    :class:`repvgg.engine.kernels.late.LateProducts` reads them.

    Attributes:
        panel: of weights, and the tiles.
        late: whether kernels are transformed across while they are used.
    """

    panel: Panel
    late: bool

    def scratch(self, width: int) -> int:
        """Floats of memory that it needs, at least 1."""
        return LateProducts(self.panel, width).floats if self.late else 1

    def write(self, write: Function, inputs: Operand, weights: Value, products: Operand, scratch: Value) -> None:
        """Write it, with so much memory; weights come to the first cache during the run of channels before."""
        if self.late:
            LateProducts(self.panel, write.width).write(write, inputs, weights, products, scratch)
            return
        panel, across = self.panel, self.panel.form.inputs[1]
        floats = panel.channels * panel.vectors * write.width
        for of_row in panel.shares:
            with write.loop(of_row[0].rows.start, of_row[0].rows.stop) as rows:
                first = write.mul(rows.index, across)
                for share in of_row:
                    with write.loop(share.columns.start, share.columns.stop) as columns:
                        place = write.add(first, columns.index)
                        tiles = inputs.from_place(write, place), products.from_place(write, place)
                        self._place(write, share, tiles, write.at(weights, write.mul(place, floats)))

    def _place(self, write: Function, share: Share, tiles: tuple[Operand, Operand], weights: Value) -> None:
        """All products of a place, whose weights are at ``weights``."""
        panel, step = self.panel, self.panel.vectors * write.width
        for run in panel.runs(write, run_length(panel.channels, cold=panel.cold)):
            at = write.at(weights, write.mul(run.begin, step))
            lanes = Lanes(at, step, write.at(at, run.length * step), step)
            panel.add(write, run, share, tiles, lanes, self._or_next(write, run.end, tiles[0].place))

    def _or_next(self, write: Function, channel: Index, place: int) -> Index:
        """A channel, or the first one of the next place where it would be behind the last."""
        if isinstance(channel, int):
            return place if channel == self.panel.channels else channel
        last = write.value(f"icmp eq i64 {channel}, {self.panel.channels}")
        return write.value(f"select i1 {last}, i64 {place}, i64 {channel}")
