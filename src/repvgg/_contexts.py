"""Context managers that change global or module state and restore it: eval mode, threads, precision, GC, seed.

PyTorch keeps the precision of float32 products in a tree: ``generic.all`` above ``cuda.all`` and ``mkldnn.all``, each
above ``matmul``, ``conv`` and ``rnn``. A node whose value is not set inherits that of its parent.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

PrecisionNode = tuple[str, str]

#: The tree of float32 precisions, parents first.
PRECISION_NODES: tuple[PrecisionNode, ...] = (
    ("generic", "all"),
    *((backend, "all") for backend in ("cuda", "mkldnn")),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")),
)


# What initializes weights with normal values; nn.init is a function of its own to modes.
_NORMAL = frozenset({torch.Tensor.normal_, nn.init.normal_, nn.init.kaiming_normal_})


class _NoNormalValues(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NORMAL:
            tensor = args[0] if args else kwargs["tensor"]  # nn.init passes everything by name
            if tensor.device.type == "meta":
                return tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def meta_device() -> Iterator[None]:
    """Make ``meta`` the default device, without drawing the normal values that its tensors do not have.

    PyTorch's rule of ``normal_`` on that device imports its compiler, which takes 2 s of CPU time in a new process.
    """
    with torch.device("meta"), _NoNormalValues():
        yield


# The modules that are in an eval_mode, by id: the module, its mode before, and the number of contexts.
_in_eval_mode: dict[int, tuple[nn.Module, bool, int]] = {}
_modes_lock = Lock()


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """Set every module of ``models`` to eval mode, and restore each module's mode afterwards.

    Several threads may do so with one model: the mode is restored at the end of the last context. Objects that are not
    an ``nn.Module`` are ignored.
    """
    modules = list({module: None for model in models if isinstance(model, nn.Module) for module in model.modules()})
    with _modes_lock:
        for module in modules:
            _, mode, count = _in_eval_mode.get(id(module), (module, module.training, 0))
            _in_eval_mode[id(module)] = module, mode, count + 1
            module.training = False  # not .eval(): modules made by torch.export refuse it
    try:
        yield
    finally:
        with _modes_lock:
            for module in modules:
                _, mode, count = _in_eval_mode.pop(id(module))
                if count > 1:
                    _in_eval_mode[id(module)] = module, mode, count - 1
                else:
                    module.training = mode


# How many gc_paused are open; whether collection was enabled before the first of them; and whether anyone else had
# frozen objects. That is found out once, and holds even if they are thawed later: to count them takes 30 ms in a
# process with PyTorch, as each is visited.
_gc_pauses, _gc_enabled, _others_froze = 0, True, False
_gc_lock = Lock()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable automatic garbage collection, which visits every live object in its full passes.

    Explicit calls of ``gc.collect`` inside only visit objects that were created inside, and so are cheap.
    """
    global _gc_pauses, _gc_enabled, _others_froze
    with _gc_lock:
        if not _gc_pauses:
            _gc_enabled = gc.isenabled()
            _others_froze = _others_froze or gc.get_freeze_count() > 0
            if not _others_froze:  # unfreezing would also thaw what the user froze
                gc.freeze()
        _gc_pauses += 1
        gc.disable()
    try:
        yield
    finally:
        with _gc_lock:
            _gc_pauses -= 1
            if not _gc_pauses:
                if not _others_froze:
                    gc.unfreeze()
                if _gc_enabled:
                    gc.enable()


@contextmanager
def num_threads(number: int | None) -> Iterator[None]:
    """Set PyTorch's number of intra-op threads; None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def preserve_fp32_precision() -> Iterator[None]:
    """Restore the tree of float32 precisions to what it is on entry.

    Older flags such as ``torch.set_float32_matmul_precision``, which ``torch.compile`` sets and restores, write to the
    tree as well, and restoring them does not restore the tree.
    """
    before = {node: precision_of(node) for node in PRECISION_NODES}
    try:
        yield
    finally:
        for node, value in before.items():
            if precision_of(node) != value:
                set_precision(node, "none")  # inherit again, if that gives the value
            if precision_of(node) != value:
                set_precision(node, value)


def precision_of(node: PrecisionNode) -> str:
    """Return the precision of float32 products at a node: its value, or the inherited one."""
    return torch._C._get_fp32_precision_getter(*node)


def set_precision(node: PrecisionNode, value: str) -> None:
    """Set the value of a node; ``"none"`` makes it inherit."""
    # Not the public torch.backends.mkldnn.fp32_precision: assigning it writes generic.all (seen in PyTorch 2.15).
    torch._C._set_fp32_precision_setter(*node, value)


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Seed torch's CPU generator from ``keys`` inside the context, and restore its state afterwards.

    Keys that name a position, such as ``seeded("step", seed, step)``, make random numbers a function of that position:
    a resumed run draws the numbers of an uninterrupted one without saved generator state. For initial weights::

        with seeded("model", 0):
            model = create_model("repvgg_t0", num_classes=10, in_channels=1)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(*keys))
        yield


def derived_seed(*keys: int | str) -> int:
    """Hash ``keys`` into a seed of 63 bits, the same on every machine and for every PYTHONHASHSEED."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes int64 seeds
