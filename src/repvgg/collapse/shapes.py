"""The shapes of the tensors in a flat graph, where what reads them does not tell: run once, without values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.collapse.evaluator import Evaluator, to_meta
from repvgg.collapse.flat import Flat
from repvgg.collapse.values import Expected, Shapes
from repvgg.symbolic import Layout

_GUESS = (224, 224, 32)  # height, width and depth


def depends_on_ranks(module: nn.Module) -> bool:
    """Whether there is a batch norm in ``module`` that takes tensors of more than one rank."""
    return any(isinstance(part, _BatchNorm) and not isinstance(part, nn.BatchNorm2d) for part in module.modules())


def made_up(expected: Sequence[Expected | None]) -> tuple[Tensor, ...] | None:
    """Tensors, without values, such as are expected; None where that is not known of one."""
    if not expected or any(one is None or one[1].rank is None for one in expected):
        return None
    return tuple(torch.empty(2, *_shape(*one), device="meta") for one in expected if one is not None)


def _shape(channels: int, layout: Layout) -> tuple[int, ...]:
    sizes = _GUESS[: (layout.rank or 2) - 2]
    return (*sizes, channels) if layout.rows else (channels, *sizes)


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
