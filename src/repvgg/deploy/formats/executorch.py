"""ExecuTorch programs (.pte) for XNNPACK on CPUs; the notes are in a JSON file next to it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.export import Dim

from repvgg._contexts import eval_mode
from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.flat import FlatModule
from repvgg.deploy.formats.pt2 import inventory_of_graph
from repvgg.deploy.inventory import Inventory
from repvgg.deploy.notes import json_beside, names_note, read_notes, take_names, write_notes
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.deploy.torch_export import silence
from repvgg.errors import ExportError, UsageError, first_line, require

_MOST_IMAGES = 16  # memory is planned for the largest batch
_DELEGATE = "executorch_call_delegate"


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Lower a model to XNNPACK and write it; operators that XNNPACK lacks run in ExecuTorch's portable kernels."""
    call = spec.example
    flat = FlatModule(spec.in_precision(model), call)
    shapes = ({0: Dim("batch", min=1, max=_MOST_IMAGES)},) if spec.dynamic_batch else None
    module = flat.model if flat.is_plain else flat
    with eval_mode(module), silence(), torch.no_grad():
        exir: Any = require("executorch.exir", "executorch")
        xnnpack: Any = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
        program = torch.export.export(
            module, tuple(call.tensors()), dynamic_shapes=shapes if flat.is_plain else shapes and (shapes,)
        )
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        inventory = _inventory(lowered.exported_program())  # before to_executorch(), which changes the graph
        path.write_bytes(lowered.to_executorch().buffer)
    names = names_note(inputs=flat.inputs, outputs=flat.outputs, dynamic_batch=spec.dynamic_batch)
    write_notes(json_beside(path), path.name, {**spec.notes, **names})
    return Written(inventory, _MOST_IMAGES if spec.dynamic_batch else 1)


def _inventory(program: Any) -> Inventory:
    """Return the operators of a lowered program, inside and outside of the parts that XNNPACK runs."""
    outside = inventory_of_graph(program.graph, program.graph_signature.user_inputs)
    not_delegated = {name: count for name, count in outside.operators.items() if _is_work(name)}
    total = Counter(not_delegated)
    norms, sums = list(outside.norms), list(outside.sums)
    for name, part in program.graph_module.named_children():
        inner = part.original_module
        # Its constants are inputs of the graph, too, with the names of parameters.
        constants = {*inner.graph_signature.inputs_to_parameters, *inner.graph_signature.inputs_to_buffers}
        inputs = [node.name for node in inner.graph.nodes if node.op == "placeholder" and node.name not in constants]
        found = inventory_of_graph(inner.graph, inputs)
        for kind, count in found.operators.items():
            total[kind] += count
        norms += [f"{name}: {one}" for one in found.norms]
        sums += [f"{name}: {one}" for one in found.sums]
    return Inventory(dict(total.most_common()), tuple(norms), tuple(sums), not_delegated)


def _is_work(name: str) -> bool:
    return name != _DELEGATE and not name.startswith("aten.sym_size")


@final
class ExecuTorchRunner:
    """A .pte file: ``logits = runner(images)``, in parts of at most as many images as memory was planned for.

    Its threads are those of the process, one for each core. See :class:`repvgg.deploy.OnnxRunner` for the attributes.

    Raises:
        ExportError: the file does not exist, or ExecuTorch cannot load it.
        MissingDependencyError: executorch is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise ExportError(f"There is no file {str(path)!r}: export the model first.")
        try:
            with silence(), _quiet_native_code():
                runtime = require("executorch.runtime", "executorch").Runtime.get()
                if threads is not None:
                    require("executorch.extension.pybindings.portable_lib", "executorch")._unsafe_reset_threadpool(
                        threads
                    )
                self._program = runtime.load_program(path)
                self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise ExportError(f"{str(path)!r} cannot be loaded by ExecuTorch: {first_line(error)}.") from error
        about = self._method.metadata
        sizes = [tuple(about.input_tensor_meta(index).sizes()) for index in range(about.num_inputs())]
        self.notes = read_notes(json_beside(path))
        names = {
            "inputs": [f"input_{index}" for index in range(len(sizes))],
            "outputs": [f"output_{index}" for index in range(about.num_outputs())],
            "dynamic_batch": False,
            **take_names(self.notes, path),
        }
        self._at_once = sizes[0][0]
        self.input_shape: tuple[int | None, ...] = (None if names["dynamic_batch"] else self._at_once, *sizes[0][1:])
        self.inputs = dict.fromkeys(names["inputs"], self.input_shape)
        self.outputs: tuple[str, ...] = tuple(names["outputs"])
        self.dtype = torch.float32

    def __call__(self, *args: Tensor) -> Any:
        """Return the outputs on the CPU."""
        if len(args) != len(self.inputs):
            raise UsageError(f"{str(self.path)!r} takes {', '.join(self.inputs)}, not {len(args)} inputs.")
        parts = zip(*(torch.split(x.detach().contiguous(), self._at_once) for x in args), strict=True)
        # Cloned: the runtime returns its own memory, which the next call overwrites.
        found = [[tensor.clone() for tensor in self._method.execute([x.contiguous() for x in part])] for part in parts]
        values = [torch.cat(column) for column in zip(*found, strict=True)]
        return values[0] if len(values) == 1 else dict(zip(self.outputs, values, strict=True))


@contextmanager
def _quiet_native_code() -> Iterator[None]:
    """Discard what native code writes to standard error: ExecuTorch reports each file in which it looks for CPUs."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def load(path: Path, threads: int | None = None) -> ExecuTorchRunner:
    """Open a file, which is a program: only one that you trust."""
    return ExecuTorchRunner(path, threads)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("executorch", request, write, load)
