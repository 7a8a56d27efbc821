"""Core ML packages (.mlpackage), converted on any system; only macOS runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from repvgg._contexts import eval_mode
from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.flat import FlatModule
from repvgg.deploy.inventory import Inventory, Kinds, Operation, take_inventory
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.deploy.torch_export import silence
from repvgg.errors import ExportError, require

_KINDS = Kinds(norms={"batch_norm"}, sums={"add"}, shapes={"shape"})
_INLINE_NUMBERS = 10  # smaller tensors are stored in the description instead of the file of weights


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Convert a model; the notes become metadata. The weights are read back and compared with the model's.

    Raises:
        ExportError: a weight of a convolution is not in the file.
    """
    call = spec.example
    flat = FlatModule(model, call)
    module = flat.model if flat.is_plain else flat
    with silence():
        tools: Any = require("coremltools", "coreml")
        with eval_mode(module), torch.no_grad():
            # Decomposed: coremltools reads the operators of inference only.
            program = torch.export.export(module, tuple(call.tensors())).run_decompositions({})
        half = spec.precision == "float16"
        converted = tools.convert(
            program,
            inputs=[
                tools.TensorType(name=name, shape=tuple(x.shape), dtype=float)
                for name, x in zip(flat.inputs, call.tensors(), strict=True)
            ],
            outputs=[tools.TensorType(name=name, dtype=float) for name in flat.outputs],
            compute_precision=tools.precision.FLOAT16 if half else tools.precision.FLOAT32,
            minimum_deployment_target=tools.target.iOS16,
            skip_model_load=True,
        )
        for name, text in spec.notes.items():
            converted.user_defined_metadata[f"repvgg.{name}"] = text
        converted.save(str(path))
    found, total = _weights_in(path, model, torch.float16 if half else torch.float32)
    if found < total:
        raise ExportError(f"{total - found} of {total} weights of convolutions are not in the Core ML package.")
    remark = f"its {total} weight tensors of convolutions are those of the network, bit for bit."
    names = tuple(flat.inputs), tuple(flat.outputs)
    return Written(_inventory(converted._mil_program), 1, *names, (remark,))


def _weights_in(path: Path, model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many weights of convolutions are in the file of weights, byte for byte, and how many there are."""
    stored = b"".join(file.read_bytes() for file in sorted(path.rglob("weight.bin")))
    convolutions = (module.weight for module in model.modules() if isinstance(module, nn.Conv2d))
    weights = [weight.detach().to(dtype).contiguous() for weight in convolutions if weight.numel() > _INLINE_NUMBERS]
    return sum(weight.numpy().tobytes() in stored for weight in weights), len(weights)


def _inventory(program: Any) -> Inventory:
    main = program.functions["main"]
    operations = []
    for one in main.operations:
        if one.op_type == "const":
            continue
        read = [value.name for values in one.inputs.values() for value in _as_list(values)]
        # With the preprocessing in the graph, coremltools makes one of its product and its sum.
        kind = "normalization of pixels" if one.op_type == "batch_norm" and read[0] in main.inputs else one.op_type
        operations.append(Operation(kind, one.name, read, [value.name for value in one.outputs]))
    return take_inventory(operations, main.inputs, _KINDS)


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("coreml", request, write, None)
