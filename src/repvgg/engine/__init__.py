"""A compiler of networks for CPUs: it generates machine code for one network, with llvmlite.

The passes, from a module to a call, and the values between them::

    compiled_model.py  ``compile``, and the callable that it returns, with an executable for each input size
    operator.py        the callable as one operator in the graphs of torch.compile and torch.export
    recorder.py        nn.Module or FX graph  -> calls            (run on a copy, on tensors without values)
    frontend.py        calls                  -> graph            (translate.py, handlers/, views.py)
    partition.py       calls                  -> parts            (what the engine runs, and what PyTorch runs)
    fusion.py          graph                  -> graph            (epilogues, folded batch norms)
    graph.py           graph, input sizes     -> shapes           (the operations; shape inference)
    planner/           graph, shapes, target  -> plan             (algorithm selection, layouts, lowering, buffers)
    executable.py      plan                   -> step table       (its code, buffers and packed weights)
    codegen/           kernels                -> machine code     (LLVM IR, compiler, disk cache)
    runtime/           step table, images     -> output           (thread pool; memory and its layouts)
    library/           plan                   -> C library        (without Python; ``load`` runs it in Python)

``kernels/`` and ``winograd/`` hold the kernels that the planner selects from, and that emit their IR.
"""

from __future__ import annotations

from repvgg.engine.codegen.disk_cache import clear_cache
from repvgg.engine.compiled_model import CompiledModel, InTorch, Network, TorchFallback, compile  # noqa: A004
from repvgg.engine.library.loaded import CompiledLibrary, load
from repvgg.engine.partition import PartitionedModel
from repvgg.engine.torch_backend import repvgg_backend

__all__ = [
    "CompiledLibrary",
    "CompiledModel",
    "InTorch",
    "Network",
    "PartitionedModel",
    "TorchFallback",
    "clear_cache",
    "compile",
    "load",
    "repvgg_backend",
]
