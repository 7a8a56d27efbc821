"""ONNX nodes for operators that the exporter of PyTorch writes as gathers and sums of pixels, at fixed image sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from repvgg.errors import UnsupportedError, require

# The oldest operator set in which Resize has axes.
_OPSET = "opset18"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the functions that write nodes, by operator, as ``torch.onnx.export`` takes them.

    - Adaptive average pooling of H x W pixels to h x w cells: ``P_h · X · P_wᵀ`` with the two constant matrices of
      :func:`pooling_matrix`, exact for every size; one ``ReduceMean`` for a single cell, and one ``AveragePool`` where
      h and w divide H and W.
    - Bilinear interpolation to a fixed size: one ``Resize`` whose axes are height and width only.

    Raises:
        MissingDependencyError: onnxscript is not installed.
    """
    require("onnxscript", "onnx")
    return {
        torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
        torch.ops.aten.upsample_bilinear2d.vec: _upsample_bilinear2d,
    }


def pooling_matrix(size: int, cells: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the averages of adaptive pooling along one axis as a (cells, size) matrix.

    Cell i is the mean of the pixels from ``⌊i·size/cells⌋`` up to but not including ``⌈(i+1)·size/cells⌉``.
    """
    matrix = np.zeros((cells, size))
    for cell in range(cells):
        first, end = cell * size // cells, -(-(cell + 1) * size // cells)
        matrix[cell, first:end] = 1 / (end - first)
    return matrix


def _adaptive_avg_pool2d(self: Any, output_size: Sequence[int]) -> Any:
    op = _operators()
    cells = tuple(int(side) for side in output_size)
    if cells == (1, 1):
        return op.ReduceMean(self, op.Constant(value_ints=[-2, -1]), keepdims=1)
    size = _fixed_sides(self, "adaptive_avg_pool2d")
    if cells == size:
        return op.Identity(self)
    step = [side // number for side, number in zip(size, cells, strict=True)]
    if len(self.shape) == 4 and all(side % number == 0 for side, number in zip(size, cells, strict=True)):
        return op.AveragePool(self, kernel_shape=step, strides=step)
    rows, columns = (pooling_matrix(side, number) for side, number in zip(size, cells, strict=True))
    # Columns first: one matrix product for all rows of all channels, which leaves less for the other.
    return op.MatMul(_constant(rows, self), op.MatMul(self, _constant(columns.T, self)))


def _upsample_bilinear2d(
    self: Any, output_size: Sequence[int] | None, align_corners: bool, scale_factors: Sequence[float] | None
) -> Any:
    op = _operators()
    mode = "align_corners" if align_corners else "pytorch_half_pixel"
    options = {"mode": "linear", "coordinate_transformation_mode": mode, "axes": [2, 3]}
    if scale_factors is not None:
        return op.Resize(self, None, op.Constant(value_floats=list(scale_factors)), None, **options)
    assert output_size is not None
    if not all(isinstance(side, int) for side in output_size):
        raise UnsupportedError("bilinear interpolation needs a size that does not depend on the values of a tensor")
    return op.Resize(self, None, None, op.Constant(value_ints=list(output_size)), **options)


def _operators() -> Any:
    return getattr(require("onnxscript", "onnx"), _OPSET)


def _fixed_sides(x: Any, operator: str) -> tuple[int, int]:
    height, width = (side if isinstance(side, int) else None for side in list(x.shape)[-2:])
    if height is None or width is None:
        raise UnsupportedError(f"{operator} needs feature maps whose height and width are fixed in the file")
    return height, width


def _constant(matrix: np.ndarray[Any, np.dtype[np.float64]], like: Any) -> Any:
    """Return a constant in the dtype of a value."""
    tensor = require("onnxscript", "onnx").ir.tensor(matrix.astype(like.dtype.numpy()))
    return _operators().Constant(value=tensor)
