"""Full float32 precision while comparing, and the tolerance of each dtype.

:mod:`repvgg._contexts` explains how PyTorch keeps the precision of float32 products. An older API
(``torch.set_float32_matmul_precision``, ``allow_tf32``) has flags of its own beside that tree, and both PyTorch's
getters and its CUDA kernels raise where flag and tree disagree. So both are set here, and both are restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from repvgg._contexts import PRECISION_NODES, PrecisionNode, precision_of, preserve_fp32_precision, set_precision
from repvgg.errors import UsageError

_BACKENDS = ("cuda", "mkldnn")
_ROOT: PrecisionNode = ("generic", "all")

#: Unit roundoff of each dtype: the largest relative error of rounding a number once.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

#: Roundings, all in the same direction, that any candidate is allowed. Two correct programs that add the same products
#: in another order differ by a few roundings per layer and by tens over a network. float64 is allowed 9007, which is
#: 1e-12: no mistake in a network is that small. The coarse types are allowed few, as 64 roundings of bfloat16 would
#: accept an error of a quarter.
ROUNDINGS = {torch.float64: 1e-12 / 2.0**-53, torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 8.0}

#: The smallest tolerance of each dtype: 1e-12, 3.8e-06, 7.8e-03, 3.1e-02.
FLOORS = {dtype: ROUNDINGS[dtype] * unit for dtype, unit in UNIT_ROUNDOFF.items()}

#: The candidate's error may be this many times the reference's error in the same dtype.
REFERENCE_FACTOR = 4.0


def name_of(dtype: torch.dtype) -> str:
    """Return ``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype`` if it has a tolerance.

    Raises:
        UsageError: it is none of float64, float32, float16 and bfloat16.
    """
    if dtype not in FLOORS:
        known = ", ".join(map(name_of, FLOORS))
        raise UsageError(f"The candidate's dtype must be one of {known}, got {name_of(dtype)}.")
    return dtype


def tolerance_for(dtype: torch.dtype, reference_error: float | None) -> tuple[float, str]:
    """Return the default tolerance and its origin as text.

    ``max(4 · reference_error, floor(dtype))``, and the floor alone for float64 or where ``reference_error`` is None
    or infinite (an overflow is no measure of what is tolerable).
    """
    name, floor = name_of(dtype), FLOORS[dtype]
    origin = f"the floor of {name}, {ROUNDINGS[dtype]:.0f} roundings"
    if dtype is torch.float64:
        return floor, origin
    if reference_error is None or reference_error == float("inf"):
        return floor, f"{origin}, as the error of the reference itself in {name} is unknown"
    scaled = f"{REFERENCE_FACTOR:.0f} x the error of the reference itself in {name}, {reference_error:.1e}"
    if REFERENCE_FACTOR * reference_error > floor:
        return REFERENCE_FACTOR * reference_error, scaled
    return floor, f"{origin}, which is more than {scaled}"


@contextmanager
def full_float32() -> Iterator[None]:
    """Disable TF32 and bfloat16 inside float32 products, whichever API enabled them, and restore all flags.

    PyTorch's flags are global to the process, so other threads see the change. Inside, reading the old flag
    ``torch.backends.cudnn.allow_tf32`` raises PyTorch's own error about mixed APIs where that flag is on: writing it
    would overwrite the default of ``cuda.conv``, which no API can restore.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_fp32_precision())
        # Parents first: a node that is not "ieee" under parents that are must have a value of its own.
        for node in PRECISION_NODES:
            stack.enter_context(_at_ieee(node))
        stack.enter_context(_legacy_highest())
        yield


@contextmanager
def _at_ieee(node: PrecisionNode) -> Iterator[None]:
    value = precision_of(node)
    if value == "ieee":  # its own value or inherited: writing it would end the inheritance
        yield
        return
    set_precision(node, "ieee")
    try:
        yield
    finally:
        set_precision(node, value)


@contextmanager
def _legacy_highest() -> Iterator[None]:
    """Set the old flag for matrix products to "highest". Every node of the tree is at "ieee" already."""
    flag = _legacy_precision()
    if flag == "highest":
        yield
        return
    own = {(backend, "matmul"): _own_matmul_value(backend) for backend in _BACKENDS}
    _set_legacy_precision("highest")
    try:
        yield
    finally:
        _set_legacy_precision(flag)  # overwrites both matmul nodes
        for node, value in own.items():
            set_precision(node, value)


def _own_matmul_value(backend: str) -> str:
    """Return the own value of a backend's ``matmul``, "none" if it inherits. All nodes read "ieee" at this point."""
    parent = (backend, "all")
    return _own_value((backend, "matmul"), parent, _own_value(parent, _ROOT, "ieee"))


def _own_value(node: PrecisionNode, parent: PrecisionNode, own_of_parent: str) -> str:
    # PyTorch has no getter for it: change the parent and see whether the node follows.
    set_precision(parent, "tf32")
    inherits = precision_of(node) == "tf32"
    set_precision(parent, own_of_parent)
    return "none" if inherits else "ieee"


def _legacy_precision() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of PyTorch warn that the API is deprecated
        return torch.get_float32_matmul_precision()


def _set_legacy_precision(value: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(value)
