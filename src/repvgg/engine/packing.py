"""Weights and biases as the kernels read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from repvgg.engine.images import round_up
from repvgg.engine.kernels.conv import pack
from repvgg.engine.layers import Conv, Floats
from repvgg.engine.winograd import TAPS, Form

#: From a convolution, floats in a vector, vectors of a panel, a form of Winograd or None, and whether kernels are
#: transformed late, to weights and biases.
Packing: TypeAlias = Callable[[Conv, int, int, Form | None, bool], tuple[Floats, Floats]]

_NUMBERS = itertools.count()


def packed(layer: Conv, width: int, vectors: int, form: Form | None, late: bool) -> tuple[Floats, Floats]:
    """Weights, in Winograd's domain if there is a form, and biases, in the order that kernels read them."""
    if form is None:
        return pack(layer, width, vectors)
    moved = replace(layer, weight=form.transformed(layer.weight, late=late))
    return pack(moved, width, vectors, together=TAPS if late else 1)


def any_weights(layer: Conv, width: int, vectors: int, form: Form | None, late: bool) -> tuple[Floats, Floats]:
    """As many numbers as :func:`packed` would make, without the work: for those who only look at the time.

    No two arrays are equal, so that none is taken for another.
    """
    outputs, inputs = layer.weight.shape[:2]
    groups = layer.geometry.groups
    wide = groups * round_up(outputs // groups, width)
    places = form.sets(late=late) if form else layer.geometry.kernel[0] * layer.geometry.kernel[1]
    weights = np.full(places * inputs * wide, 0.01, np.float32)
    weights[0] = next(_NUMBERS)
    return weights, np.zeros(wide, np.float32)
