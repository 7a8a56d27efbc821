"""The plain network's own engine for CPUs: machine code that is made for one network, by llvmlite.

From above to below::

    network.py    the callable: checks, buffers, one call for a whole network
    workers.py    the threads that help the caller
    program.py    the table of steps, and the functions that run it
    plan.py       layers and an input size -> kernels, buffers and packed weights
    choice.py     which way a convolution is computed, by a table of costs
    reader.py     nn.Module -> layers
    layers.py     what a plain network is: a chain of convolutions, gates, a pool and linear layers
    kernels/      the IR of each kind of layer, and the layout of its weights
    winograd.py   the matrices of F(m x m, 3x3)
    images.py     how feature maps lie in memory
    memory.py     aligned memory
    ir.py         writing IR
    isa.py        which vectors a processor has
    jit.py        IR -> machine code
"""

from __future__ import annotations

from repvgg.engine.network import Network, compile  # noqa: A004

__all__ = ["Network", "compile"]
