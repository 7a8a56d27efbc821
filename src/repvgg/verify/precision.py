"""How exact float32 is: full precision while judging, and the tolerance of each dtype.

How PyTorch keeps the precision of float32 products is told in :mod:`repvgg._contexts`. An older API
(``torch.set_float32_matmul_precision``, ``allow_tf32``) keeps flags of its own beside the tree, and both PyTorch's
getters and its CUDA kernels raise where flag and tree disagree. So both are set here, and both are put back.
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

#: How many roundings, all to the same side, are granted to a candidate in any case. Two correct programs that add up
#: the same products in another order differ by a few roundings in a layer and by tens over a network. float64 is
#: granted 9007, which is 1e-12: it costs nothing there, since no mistake in a network is that small. The coarse types
#: are granted few, as 64 roundings of bfloat16 would pass an error of a quarter.
ROUNDINGS = {torch.float64: 1e-12 / 2.0**-53, torch.float32: 64.0, torch.float16: 16.0, torch.bfloat16: 8.0}

#: The smallest tolerance of each dtype: 1e-12, 3.8e-06, 7.8e-03, 3.1e-02.
FLOORS = {dtype: ROUNDINGS[dtype] * unit for dtype, unit in UNIT_ROUNDOFF.items()}

#: A candidate may err this many times as much as the reference does in the same dtype.
REFERENCE_FACTOR = 4.0


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as "float32"."""
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype`` if a tolerance is known for it.

    Raises:
        UsageError: it is none of float64, float32, float16 and bfloat16.
    """
    if dtype not in FLOORS:
        known = ", ".join(map(name_of, FLOORS))
        raise UsageError(f"A candidate is judged in one of {known}, not in {name_of(dtype)}.")
    return dtype


def tolerance_for(dtype: torch.dtype, reference_error: float | None) -> tuple[float, str]:
    """The tolerance where the caller gives none, and where it comes from.

    ``max(4 · reference_error, floor(dtype))``, and the floor alone for float64 or where ``reference_error`` is None
    or infinite (an overflow says nothing about what is tolerable).
    """
    name, floor = name_of(dtype), FLOORS[dtype]
    origin = f"the floor of {name}, {ROUNDINGS[dtype]:.0f} roundings"
    if dtype is torch.float64:
        return floor, origin
    if reference_error is None or reference_error == float("inf"):
        return floor, f"{origin}, as it is not known how much the reference itself errs in {name}"
    scaled = f"{REFERENCE_FACTOR:.0f} x the {reference_error:.1e} that the reference itself errs in {name}"
    if REFERENCE_FACTOR * reference_error > floor:
        return REFERENCE_FACTOR * reference_error, f"{scaled} on these inputs"
    return floor, f"{origin}, more than {scaled}"


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products, whichever API has asked for them; all is put back after.

    PyTorch's flags are global to the process, so other threads see the change as well. While it lasts, reading the
    old flag ``torch.backends.cudnn.allow_tf32`` raises PyTorch's own complaint about mixed APIs where that flag is
    on: writing it would overwrite the default of ``cuda.conv``, which no API can restore.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_fp32_precision())
        # Parents first: whatever still is not "ieee" under parents that are must have that value of its own.
        for node in PRECISION_NODES:
            stack.enter_context(_at_ieee(node))
        stack.enter_context(_legacy_highest())
        yield


@contextmanager
def _at_ieee(node: PrecisionNode) -> Iterator[None]:
    """One node of the tree at full precision. A node that is there already, or inherits it, is not touched."""
    value = precision_of(node)
    if value == "ieee":
        yield
        return
    set_precision(node, "ieee")
    try:
        yield
    finally:
        set_precision(node, value)


@contextmanager
def _legacy_highest() -> Iterator[None]:
    """The old flag for matrix products at "highest". Every node of the tree is at "ieee" already."""
    flag = _legacy()
    if flag == "highest":
        yield
        return
    own = {(backend, "matmul"): _own_of_matmul(backend) for backend in _BACKENDS}
    _set_legacy("highest")
    try:
        yield
    finally:
        _set_legacy(flag)  # which overwrites both nodes
        for node, value in own.items():
            set_precision(node, value)


def _own_of_matmul(backend: str) -> str:
    """The own value of a backend's ``matmul``, "none" if it follows its parent. All nodes read "ieee" now."""
    parent = (backend, "all")
    return _own((backend, "matmul"), parent, _own(parent, _ROOT, "ieee"))


def _own(node: PrecisionNode, parent: PrecisionNode, own_of_parent: str) -> str:
    """Found out by moving the parent for a moment."""
    set_precision(parent, "tf32")
    follows = precision_of(node) == "tf32"
    set_precision(parent, own_of_parent)
    return "none" if follows else "ieee"


def _legacy() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions announce that the API is old
        return torch.get_float32_matmul_precision()


def _set_legacy(value: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(value)
