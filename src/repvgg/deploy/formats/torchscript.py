"""TorchScript, run in PyTorch: for C++ programs that load nothing newer; PyTorch advises ``torch.export`` instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.flat import FlatModule
from repvgg.deploy.inventory import Kinds, Operation, take_inventory
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.deploy.torch_export import NOTES, silence
from repvgg.errors import ExportError, first_line

_KINDS = Kinds(norms={"aten::batch_norm"}, sums={"aten::add", "aten::add_"}, shapes={"aten::size"})
_NO_OPERATORS = ("prim::", "aten::Int", "aten::size", "aten::ScalarImplicit")
_ABOUT = "repvgg-file.json"  # names and shapes of inputs and outputs


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Trace a model and write it; the notes are an extra file."""
    call = spec.example
    flat = FlatModule(spec.in_precision(model), call)
    jit: Any = torch.jit  # without types
    with silence(), torch.no_grad():  # a deprecation of tracing
        traced = jit.trace(flat.model if flat.is_plain else flat, tuple(call.tensors()), check_trace=False)
        frozen = jit.freeze(traced.eval())
        shape = [None if spec.dynamic_batch else 1, *spec.shape]
        about = {"inputs": flat.inputs, "outputs": flat.outputs, "shape": shape}
        extra = {NOTES: json.dumps(dict(spec.notes)), _ABOUT: json.dumps(about)}
        jit.save(frozen, str(path), _extra_files=extra)
    operations = [
        Operation(
            node.kind(), name, [one.debugName() for one in node.inputs()], [one.debugName() for one in node.outputs()]
        )
        for node in frozen.inlined_graph.nodes()
        if not node.kind().startswith(_NO_OPERATORS)
        for name in [next(iter(node.outputs())).debugName()]
    ]
    images = list(frozen.inlined_graph.inputs())[1].debugName()  # the first is the module
    return Written(take_inventory(operations, [images], _KINDS), None)


@final
class TorchScriptRunner:
    """A TorchScript file: ``logits = runner(images)``. See :class:`repvgg.deploy.OnnxRunner` for the attributes.

    Such a file is a program: load only files that you trust.

    Raises:
        ExportError: the file cannot be loaded, or was not written by this library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        extra = {NOTES: "", _ABOUT: ""}
        try:
            with silence():
                jit: Any = torch.jit  # without types
                self.module = jit.load(str(path), map_location="cpu", _extra_files=extra)
            about = json.loads(extra[_ABOUT])
            self.notes: dict[str, str] = json.loads(extra[NOTES])
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"{str(path)!r} is not a TorchScript file of this library: {first_line(error)}."
            ) from error
        self.input_shape: tuple[int | None, ...] = tuple(about["shape"])
        self.inputs = dict.fromkeys(about["inputs"], self.input_shape)
        self.outputs: tuple[str, ...] = tuple(about["outputs"])
        self.dtype = torch.float32

    def __call__(self, *args: Tensor) -> Any:
        """Return the outputs."""
        with torch.no_grad():
            found = self.module(*args)
        if isinstance(found, Tensor):
            return found
        return found[0] if len(found) == 1 else dict(zip(self.outputs, found, strict=True))


def load(path: Path, threads: int | None = None) -> TorchScriptRunner:
    """Open a file, which is a program: only one that you trust. The threads are those of PyTorch."""
    return TorchScriptRunner(path)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("torchscript", request, write, load)
