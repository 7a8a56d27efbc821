"""Cheap questions about nodes of a flat graph, asked before anything is evaluated."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.collapse.flat import Flat
from repvgg.collapse.modules import is_leaf
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import Source, SymbolicTensor, guarded


def asks_what_stays(node: fx.Node) -> bool:
    """Whether a node asks a tensor for what is the same at both ends of a linear region: its rank, dtype or device."""
    if node.op == "call_method":
        return node.target in ("dim", "ndimension") and len(node.args) == 1
    return node.target is getattr and node.args[1] in ("ndim", "dtype", "device")


def has_neighbours(flat: Flat) -> bool:
    """Whether two nodes that may be linear follow each other, as those of any region do. It costs little to ask.

    Where a batch norm is called the answer is yes: if it stays, somebody will want to know why. So it is where a module
    of another kind is one node, as it is more than one operation.
    """
    parts = {target: flat.module.get_submodule(target) for _, target in flat.calls()}
    if any(isinstance(part, _BatchNorm) or not is_leaf(part) for part in parts.values()):
        return True
    calls = (node for node in flat.graph.nodes if node.op.startswith("call"))
    linear = {node for node in calls if node.op != "call_module" or _may_be_linear(parts[str(node.target)])}
    return any(before in linear for node in linear for before in node.all_input_nodes)


def _may_be_linear(part: nn.Module) -> bool:
    """False for torch's own activations and the like: modules without tensors that are linear for no input."""
    if not is_leaf(part) or part._parameters or part._buffers:
        return True
    try:
        guarded(part.forward, SymbolicTensor.of(Source(), 1, device="meta"))
    except NotLinearError:
        return False
    except ReparamError:
        return True
    return True
