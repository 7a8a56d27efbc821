"""Flat graphs of small models for tests of the search, and the models that its regions give."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from repvgg.collapse.cost import cheaper
from repvgg.collapse.insertion import InsertionPoint
from repvgg.collapse.recording import Frame, Recording
from repvgg.collapse.regions import Regions, SearchOptions, find_regions
from repvgg.collapse.solution import solve

ANYWHERE = InsertionPoint("call", "", frozenset({""}))


def search(model: nn.Module, x: Tensor, **options: object) -> Regions:
    """Find the regions of a model that torch.fx can trace, with the shapes of a run on ``x``."""
    recording, known = flat_graph(model, x, **options)
    return find_regions(recording, known)


def flat_graph(model: nn.Module, x: Tensor, **options: object) -> tuple[Recording, SearchOptions]:
    """Return the graph of a model with the shapes of a run on ``x``, and options for its search."""
    graph = fx.Tracer().trace(model)
    root = Frame("", None)
    frame_of = dict.fromkeys(graph.nodes, root)
    recording = Recording(model, graph, root, frame_of, {}, {}, frozenset(), (), {}, on_meta=False)
    with torch.no_grad():
        _Shapes(fx.GraphModule(model, graph), graph=graph).run(x)
    given = {"opaque": {}, "escaped": {}, "merge_branches": True, "policy": cheaper}
    given |= {"find_insertion": lambda region: ANYWHERE}
    return recording, SearchOptions(**given | options)


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta.update(shape=tuple(result.shape), dtype=result.dtype)
        return result


def plain(model: nn.Module, found: Regions) -> fx.GraphModule:
    """Return the model with its regions replaced: the graph that was searched, edited as :class:`Region` says."""
    graph = found.merged[0].region.recording.graph
    convs = nn.Module()
    new = {node: node for node in graph.nodes}
    for number, done in enumerate(found.merged):  # before the first edit: a region refers to nodes of the graph
        convs.register_module(f"merged{number}", _Conv(solve(done).map))
    for number, region in enumerate(done.region for done in found.merged):
        old = new[region.replaced]
        with graph.inserting_before(old):
            call = graph.create_node("call_module", f"merged{number}", (new[region.source],))
        old.replace_all_uses_with(call)
        graph.erase_node(old)
        new[region.replaced] = call
        for node, remaining in region.removed:
            new[node].replace_all_uses_with(new[remaining])
            graph.erase_node(new[node])
            new[node] = new[remaining]
    for norm in (done.region for done in found.absorbed):
        new[norm.exit].replace_all_uses_with(new[norm.source])
        graph.erase_node(new[norm.exit])
    root = nn.Module()
    root.__dict__.update({**model.__dict__, "_modules": {**model._modules, **convs._modules}})
    result = fx.GraphModule(root, graph)
    graph.lint()
    return result


class _Conv(nn.Module):
    def __init__(self, conv: object) -> None:
        super().__init__()
        self.map = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.double()).to(x.dtype)
