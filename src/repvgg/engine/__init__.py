"""A compiler for plain networks on CPUs: it generates machine code for one network, by way of llvmlite.

The passes, from a module to a call, and the values between them::

    frontend.py        nn.Module or FX graph -> layers                 (torch_backend.py: the same for torch.compile)
    graph.py           layers; shape inference: layers + input shape -> shapes
    planner/           layers + shapes + target -> plan: algorithm selection, layouts, lowering, buffer sharing
    codegen/           kernels -> LLVM IR -> machine code, with a disk cache
    executable.py      plan -> code, buffers, packed weights and a step table
    runtime/           the thread pool that runs a step table; memory and layouts
    compiled_model.py  the callable, which keeps an executable for each input size
    api.py             ``compile``

``kernels/`` and ``winograd/`` hold the kernels that the planner chooses from.
"""

from __future__ import annotations

from repvgg.engine.api import InTorch, TorchFallback, compile  # noqa: A004
from repvgg.engine.codegen.disk_cache import clear_cache
from repvgg.engine.compiled_model import CompiledModel, Network
from repvgg.engine.torch_backend import repvgg_backend

__all__ = ["CompiledModel", "InTorch", "Network", "TorchFallback", "clear_cache", "compile", "repvgg_backend"]
