"""A model in eval mode, PyTorch with other threads or another precision: for a while, and then as it was.

PyTorch keeps the precision of float32 products in a tree: ``generic.all`` above ``cuda.all`` and ``mkldnn.all``, each
above ``matmul``, ``conv`` and ``rnn``. A node without a value of its own follows its parent.

The tree is set through ``torch._C``: the public ``torch.backends.mkldnn.fp32_precision = …`` writes ``generic.all``
instead of ``mkldnn.all`` (seen in PyTorch 2.15).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Node = tuple[str, str]

#: The tree of precisions, parents first.
PRECISION_NODES: tuple[Node, ...] = (
    ("generic", "all"),
    *((backend, "all") for backend in ("cuda", "mkldnn")),
    *((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")),
)


@contextmanager
def eval_mode(*models: object) -> Iterator[None]:
    """Every module of ``models`` in eval mode; each comes back in the mode it had, after an error too.

    By the flags alone: modules made by ``torch.export`` refuse ``eval()``. What is no ``nn.Module`` has no mode.
    """
    modules = {part: part.training for model in models if isinstance(model, nn.Module) for part in model.modules()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without automatic garbage collection, which visits every object each time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """PyTorch with ``number`` threads for one operation; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def precision_as_found() -> Iterator[None]:
    """Put back what is written into the tree meanwhile.

    The old flags write to it, too, and do not take that back: neither ``torch.set_float32_matmul_precision`` with the
    value that it had, nor torch.compile, which restores that flag.
    """
    found = {node: precision_of(node) for node in PRECISION_NODES}
    try:
        yield
    finally:
        for node, value in found.items():
            if precision_of(node) != value:
                set_precision(node, "none")
            if precision_of(node) != value:
                set_precision(node, value)


def precision_of(node: Node) -> str:
    """What float32 products of a node are computed in, by its own value or that of its parent."""
    return torch._C._get_fp32_precision_getter(*node)


def set_precision(node: Node, value: str) -> None:
    """Give a node a value of its own; "none" has it follow its parent."""
    torch._C._set_fp32_precision_setter(*node, value)
