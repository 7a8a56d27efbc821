"""Charts of the quantizability report: SQNR of each layer, gain of each step, and the ranges of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from repvgg.quantization import QuantizedLayerReport, Step
from repvgg.studies.report.page_charts import (
    ACCENT,
    BAD,
    GOOD,
    NAME_STYLE,
    NARROW_PX,
    NEUTRAL,
    PX,
    RULE,
    SOFT,
    TOOLTIP,
    WIDE_PX,
    inline_svg,
    labelled_rows,
    new_figure,
    page_chart,
    write_in_row,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PICTURE = (230.0, 84.0)  # pixels of the pictures of a layer
_PICTURE_FONT = 10.0
_NBSP = "\u00a0"
_GAIN_PX = 90.0  # to the right of the bars: the gain in decibels


class ChannelRanges(NamedTuple):
    """The largest absolute weight of each output channel of a layer."""

    before: tuple[float, ...]  # in the given network
    after: tuple[float, ...]  # after equalization


def decibels(value: float) -> str:
    """Format a ratio in decibels; infinite is ``exact``."""
    return "exact" if value == math.inf else f"{value:.1f}{_NBSP}dB"


def gain(value: float) -> str:
    """Format a difference in decibels with its sign."""
    return f"{value:+.1f}{_NBSP}dB".replace("-", "−")


def sqnr_chart(layers: Sequence[QuantizedLayerReport]) -> str:
    """Draw the SQNR of the output with each layer alone quantized, and of each layer in the quantized network."""
    finite = [one for layer in layers for one in (layer.sqnr_alone, layer.sqnr_accumulated) if math.isfinite(one)]
    lowest, highest = min([0.0, *finite]), max([10.0, *finite])

    def draw(figure: Figure, narrow: bool) -> None:
        axes, _ = labelled_rows(figure, [(layer.name, "") for layer in layers], narrow, right=16, scale=True)
        # Space for half of the first label.
        axes.set_xlim(lowest - (0.06 if narrow else 0.0) * (highest - lowest), 1.02 * highest)
        ticks = range(10 * math.ceil(lowest / 10), int(highest) + 1, 20 if narrow and highest > 60 else 10)
        axes.set_xticks(list(ticks), [f"{tick} dB" for tick in ticks])
        axes.grid(axis="x", color=RULE, linewidth=1)
        for row, layer in enumerate(layers):
            alone, accumulated = (min(max(v, lowest), highest) for v in (layer.sqnr_alone, layer.sqnr_accumulated))
            axes.plot([accumulated, alone], [row, row], color=NEUTRAL, linewidth=2)
            for value, shown, color, what in (
                (accumulated, layer.sqnr_accumulated, SOFT, "of this layer's output in the quantized network"),
                (alone, layer.sqnr_alone, ACCENT, "of the network's output with this layer alone quantized"),
            ):
                axes.plot(
                    value, row, "o", markersize=9, color=color, clip_on=False, gid=f"{TOOLTIP}{decibels(shown)} {what}"
                )

    words = (
        f"{layer.name}: alone {decibels(layer.sqnr_alone)}, accumulated {decibels(layer.sqnr_accumulated)}"
        for layer in layers
    )
    wide, narrow = (WIDE_PX, 34 * len(layers) + 28), (NARROW_PX, 54 * len(layers) + 28)
    return page_chart("sqnr", f"SQNR of each layer. {'; '.join(words)}", draw, wide=wide, narrow=narrow)


def gain_chart(steps: Sequence[Step]) -> str:
    """Draw the gain of each measured step in decibels as a bar, losses to the left."""
    gains = [step.gain for step in steps if math.isfinite(step.gain)]
    lowest, highest = min([0.0, *gains]), max([1.0, *gains])

    def draw(figure: Figure, narrow: bool) -> None:
        right = 0 if narrow else _GAIN_PX
        axes, bar = labelled_rows(figure, [(step.name, "") for step in steps], narrow, right=right)
        axes.set_xlim(lowest, highest)
        axes.xaxis.set_visible(False)
        for row, step in enumerate(steps):
            width = min(max(step.gain, lowest), highest)
            axes.barh(row, width, height=bar, color=GOOD if step.gain >= 0 else BAD, linewidth=0)
            write_in_row(axes, row, gain(step.gain), x=1, right=right, above=narrow, **NAME_STYLE)
        axes.axvline(0, color=NEUTRAL, linewidth=1)

    words = (f"{step.name}: {gain(step.gain)}" for step in steps)
    wide, narrow = (WIDE_PX, 34 * len(steps)), (NARROW_PX, 54 * len(steps))
    return page_chart("gains", f"Gain of each step. {'; '.join(words)}", draw, wide=wide, narrow=narrow)


def weights_picture(index: int, name: str, ranges: ChannelRanges) -> str:
    """Draw the range of each output channel, from the largest to the smallest, before and after equalization."""
    before, after = (sorted((value for value in one if value > 0), reverse=True) for one in ranges)
    with new_figure(_PICTURE[0] * PX, _PICTURE[1] * PX, font=_PICTURE_FONT) as figure:
        axes = _bare_axes(figure)
        axes.set_xticks([])
        for values, color, what in ((before, NEUTRAL, "given"), (after, ACCENT, "equalized")):
            # Relative to the median: equalization changes the unit of a layer, which says nothing.
            middle = values[len(values) // 2] if values else 1.0
            axes.plot([value / middle for value in values], color=color, linewidth=2, gid=TOOLTIP + what)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.5), max(high, 2.0))
        ticks = _decades(*axes.get_ylim())
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(axis="y", color=RULE, linewidth=1)
        description = f"Ranges of the output channels of {name}, relative to their median, sorted"
        return inline_svg(figure, f"weights-{index}", description, "picture")


def inputs_picture(index: int, layer: QuantizedLayerReport) -> str:
    """Draw the histogram of the inputs of a layer, with the range that is represented."""
    lowest, highest = layer.input_range
    total = max(sum(layer.histogram), 1.0)
    edges = [lowest + (highest - lowest) * step / len(layer.histogram) for step in range(len(layer.histogram) + 1)]
    with new_figure(_PICTURE[0] * PX, _PICTURE[1] * PX, font=_PICTURE_FONT) as figure:
        # Logarithmic: the values that are clipped are few, and the zeros after a ReLU many.
        axes = _bare_axes(figure)
        axes.set_yticks([])
        axes.stairs([max(count / total, 1e-9) for count in layer.histogram], edges, fill=True, color=ACCENT, alpha=0.5)
        axes.set_ylim(1e-7, 2)
        for bound in layer.quantized_range:
            axes.axvline(min(max(bound, lowest), highest), color=BAD, linewidth=1.5)
        ends = [lowest, highest] if lowest == 0 else [lowest, 0.0, highest]
        axes.set_xticks(ends, [f"{end:.3g}" for end in ends])
        low, high = layer.quantized_range
        description = (
            f"Histogram of the inputs of {layer.name} from {lowest:.3g} to {highest:.3g}, logarithmic; integers "
            f"represent {low:.3g} to {high:.3g}"
        )
        return inline_svg(figure, f"inputs-{index}", description, "picture")


def _bare_axes(figure: Figure) -> Axes:
    """Return axes with a logarithmic y axis, without a frame and ticks."""
    axes = figure.add_subplot(yscale="log")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=SOFT, pad=3)
    axes.minorticks_off()
    return axes


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten in a range, at most four of them."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, math.ceil((last - first + 1) / 4))
    return [10.0**exponent for exponent in range(first, last + 1, step)]
