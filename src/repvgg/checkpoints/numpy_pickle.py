"""NumPy numbers and arrays in torch files, rebuilt from their bytes.

Training scripts store ``best_acc = np.float64(71.2)`` beside the weights, or the weights themselves as arrays. NumPy's
own functions for unpickling trust what they are given: here each pickled name stands for a small class that checks it.
"""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBER = re.compile(r"[biuf][0-9]{1,2}")  # booleans, integers and floating-point numbers, as NumPy writes dtypes
_ORDERS = {"<": "<", ">": ">", "|": "|", "=": "="}


class PickledDtype:
    """What a pickle says of a ``numpy.dtype``: its code, such as ``f8``, and its byte order."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in _ORDERS:
            raise pickle.UnpicklingError(f"{order!r} is no byte order")
        self.order = order

    def dtype(self) -> np.dtype[Any] | None:
        """Return the dtype; None if it is not one of numbers."""
        if not isinstance(self.code, str) or not _NUMBER.fullmatch(self.code):
            return None
        try:
            return np.dtype(self.order + self.code)
        except TypeError as error:
            raise pickle.UnpicklingError(f"{self.code!r} is no dtype") from error


class PickledArray:
    """A ``numpy.ndarray``, which a pickle fills after it has been made."""

    array: np.ndarray[Any, Any] | None = None  # None if it does not hold numbers

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array has five fields")
        _, shape, dtype, is_fortran, data = state
        kind = dtype.dtype() if isinstance(dtype, PickledDtype) else None
        if kind is None or not isinstance(data, bytes):
            return
        sizes_are_valid = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes_are_valid or math.prod(shape) * kind.itemsize != len(data):
            raise pickle.UnpicklingError("an array does not have the size of its data")
        array = np.frombuffer(data, kind).reshape(shape, order="F" if is_fortran else "C")
        self.array = np.array(array, kind.newbyteorder("="), order="C")  # a copy that may be written to

    def tensor(self) -> Tensor | None:
        """Return the array as a tensor; None if it does not hold numbers that a tensor can hold."""
        try:
            return None if self.array is None else torch.from_numpy(self.array)
        except TypeError:  # 80-bit floating-point numbers, for example
            return None


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


def _scalar(dtype: Any = None, data: Any = None) -> bool | int | float | None:
    kind = dtype.dtype() if isinstance(dtype, PickledDtype) else None
    if kind is None or not isinstance(data, bytes) or len(data) != kind.itemsize:
        return None
    number: bool | int | float = np.frombuffer(data, kind)[0].item()
    return number


_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2

#: For torch.serialization.safe_globals: what stands for each name in a pickle.
SAFE_GLOBALS: list[Any] = [
    PickledArray,
    PickledDtype,
    (PickledArray, "numpy.ndarray"),
    (PickledDtype, "numpy.dtype"),
    *((_reconstruct, f"{module}._reconstruct") for module in _MODULES),
    *((_scalar, f"{module}.scalar") for module in _MODULES),
]
