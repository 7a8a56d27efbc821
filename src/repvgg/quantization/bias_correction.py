"""Sequential bias correction: the mean of every output channel becomes that of the float network.

Rounding weights and clipping activations shift the mean of each output channel, and the shifts add up over the layers
(Nagel et al. 2019, section 4.2). The layers are corrected in the order of execution, each one on inputs that come from
the quantized and corrected layers before it, so that a correction includes what is left of all earlier errors. One pass
over all calibration images suffices, because each layer is corrected before the next one runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from repvgg.quantization.calibration import LayerStatistics, channels_last
from repvgg.quantization.layers import QuantizedLayer


def correct_bias(layer: QuantizedLayer, outputs: Iterable[Tensor], statistics: LayerStatistics) -> tuple[Tensor, float]:
    """Add to the bias of ``layer``, in place, what its output means lack.

    Args:
        layer: a layer of the quantized network.
        outputs: batches of its output (N, O, H, W) or (N, …, O) on the calibration images.
        statistics: of the layer of the float network on the same images.

    Returns:
        (O,) what was added, and its norm divided by that of the output means.
    """
    added = layer.add_to_bias(mean_shift(outputs, statistics))
    target = statistics.output_mean
    assert target is not None
    return added, float(added.norm() / target.to(added).norm().clamp_min(torch.finfo(torch.float64).tiny))


def mean_shift(outputs: Iterable[Tensor], statistics: LayerStatistics) -> Tensor:
    """Return (O,) in float64: the output means of the float network minus those of ``outputs``.

    The arguments are those of :func:`correct_bias`.
    """
    assert statistics.output_mean is not None
    total, count = torch.zeros(()), 0
    for y in outputs:
        values = channels_last(y).flatten(0, -2).double()
        total, count = total.to(values) + values.sum(0), count + len(values)
    return statistics.output_mean.to(total) - total / count


def add_to_channels(y: Tensor, values: Tensor) -> Tensor:
    """Return ``y`` (N, O, H, W) or (N, …, O) plus a value for each output channel, (O,)."""
    return y + values.to(y.dtype).reshape((-1, 1, 1) if y.ndim == 4 else (-1,))
