"""Weights and biases as the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from repvgg.engine.images import round_up
from repvgg.engine.kernels.conv import pack
from repvgg.engine.layers import Conv, Floats
from repvgg.engine.winograd import Form

#: From a convolution, a form of Winograd or None, floats in a vector and vectors of a panel to weights and biases.
Packing: TypeAlias = Callable[[Conv, Form | None, int, int], tuple[Floats, Floats]]


def packed(layer: Conv, form: Form | None, width: int, vectors: int) -> tuple[Floats, Floats]:
    """Weights, in Winograd's domain if there is a form, and biases, in the order that kernels read them."""
    moved = layer if form is None else replace(layer, weight=form.transformed(layer.weight))
    return pack(moved, width, vectors)


def any_weights(layer: Conv, form: Form | None, width: int, vectors: int) -> tuple[Floats, Floats]:
    """As many numbers as :func:`packed` would make, without the work: for those who only look at the time."""
    outputs, inputs = layer.weight.shape[:2]
    groups = layer.geometry.groups
    wide = groups * round_up(outputs // groups, width)
    places = form.places if form else layer.geometry.kernel[0] * layer.geometry.kernel[1]
    return np.full(places * inputs * wide, 0.01, np.float32), np.zeros(wide, np.float32)
