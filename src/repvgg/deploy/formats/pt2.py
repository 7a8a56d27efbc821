"""Programs of ``torch.export``, run in PyTorch."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.inventory import Inventory, Kinds, Operation, take_inventory
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.deploy.torch_export import NOTES, ProgramRunner, export_program

_ITEM = "item"  # of a tuple, no operator
#: The operators of ATen.
ATEN = Kinds(
    norms={
        "aten.batch_norm.default",
        "aten._native_batch_norm_legit_no_training.default",
        "aten.native_batch_norm.default",
    },
    sums={"aten.add.Tensor", "aten.add_.Tensor"},
    shapes={"aten.sym_size.int"},
)


def inventory_of_graph(graph: torch.fx.Graph, inputs: Iterable[str]) -> Inventory:
    """Return the operators of a graph of ``torch.fx``; ``inputs`` are the names of the nodes that are activations."""
    operations = [
        Operation(operator_name(node.target), node.name, [one.name for one in node.all_input_nodes], [node.name])
        for node in graph.nodes
        if node.op == "call_function"
    ]
    found = take_inventory(operations, inputs, ATEN)
    counted = {name: count for name, count in found.operators.items() if name != _ITEM}
    return Inventory(counted, found.norms, found.sums)


def operator_name(target: Any) -> str:
    """Return ``aten.add.Tensor``, also for an operator of ExecuTorch's edge dialect."""
    return _ITEM if target is operator.getitem else str(target).removeprefix("<EdgeOpOverload: ").partition(">")[0]


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Write a model; the notes are the extra file :data:`repvgg.deploy.torch_export.NOTES`."""
    export_program(
        spec.in_precision(model),
        path,
        inputs=spec.example,
        overwrite=True,
        dynamic_batch=spec.dynamic_batch,
        notes={NOTES: json.dumps(dict(spec.notes))},
    )
    program = ProgramRunner(path).program
    return Written(inventory_of_graph(program.graph, program.graph_signature.user_inputs), None)


def load(path: Path, threads: int | None = None) -> ProgramRunner:
    """Open a file, which is a program: only one that you trust. The threads are those of PyTorch."""
    return ProgramRunner(path)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("pt2", request, write, load)
