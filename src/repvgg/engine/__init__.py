"""The plain network's own engine for CPUs: machine code that is made for one network, by llvmlite.

From above to below::

    backend.py    the engine behind torch.compile
    compiling.py  a model -> what runs it
    network.py    the callable: checks, sizes, one call for a whole network
    runner.py     a network made for images of one size: code, buffers, weights
    plan.py       layers and an input size -> kernels, buffers and packed weights
    parts.py      which layers take a batch in parts
    search.py     which way a convolution is computed, by measuring
    remembered.py what was measured, on the disk
    choice.py     which ways there are, and which to take
    costs.py      about how long each takes, by a table
    part.py       what is asked about a convolution, and a way to compute a part of its image
    reader.py     nn.Module -> layers
    nodes.py      what a node of a traced graph computes
    layers.py     what a plain network is: a chain of convolutions, gates, a pool and linear layers
    kernels/      direct convolution, pooling, squeeze-excite, input reorder; weight panels
    winograd/     F(m x n, 3x3): minimal filters, tiling, transforms, batched GEMMs, staged and fused kernels
    codegen/      LLVM IR builder, just-in-time compiler, cache on the disk
    runtime/      thread pool, aligned memory, layouts of feature maps
"""

from __future__ import annotations

from repvgg.engine.api import InTorch, compile  # noqa: A004
from repvgg.engine.codegen.disk_cache import clear_cache
from repvgg.engine.compiled_model import Network
from repvgg.engine.torch_backend import repvgg_backend

__all__ = ["InTorch", "Network", "clear_cache", "compile", "repvgg_backend"]
