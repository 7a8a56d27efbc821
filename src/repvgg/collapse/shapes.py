"""The shapes of the tensors in a flat graph, where what reads them does not tell: run once, without values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.collapse.flat import Flat
from repvgg.collapse.values import Evaluator, Shapes, to_meta

_GUESS = (2, 224, 224)  # images, height, width


def depends_on_ranks(module: nn.Module) -> bool:
    """Whether there is a batch norm in ``module`` that takes tensors of more than one rank."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, nn.BatchNorm2d) for part in module.modules())


def made_up(channels: Sequence[int | None]) -> tuple[Tensor, ...] | None:
    """Images, without values, for inputs of so many channels; None where one of these is not known."""
    if not channels or None in channels:
        return None
    count, height, width = _GUESS
    return tuple(torch.empty(count, int(c or 0), height, width, device="meta") for c in channels)


def run_on_meta(flat: Flat, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """The outcome of every node on ``inputs``, tensors without values; nodes that do not run on these have none."""
    evaluator = Evaluator(flat, to_meta, keep_kernels=False, strict=False)
    given = iter(inputs)
    known: dict[fx.Node, Any] = {}
    for node in flat.graph.nodes:
        try:
            if node.op == "placeholder":
                value = next(given)
                known[node] = to_meta(value) if isinstance(value, Tensor) and value.is_floating_point() else value
            elif node.op == "get_attr":
                known[node] = evaluator.constant(node)
            elif node.op != "output":
                known[node] = evaluator.run(node, known.__getitem__)
        except Exception:  # a stranger's code, without values to work on
            continue
    return known


def shapes_of(known: Mapping[fx.Node, Any]) -> Shapes:
    """The shapes of those that are tensors."""
    return {node: tuple(value.shape) for node, value in known.items() if isinstance(value, Tensor)}
