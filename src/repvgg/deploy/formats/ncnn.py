"""ncnn, for phones: a description (.param), the weights (.bin), and the notes in a JSON file; written by pnnx."""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from repvgg.deploy.file_target import FileSpec, Written, export_file
from repvgg.deploy.flat import FlatModule
from repvgg.deploy.inventory import Inventory, Kinds, Operation, take_inventory
from repvgg.deploy.notes import json_beside, names_note, read_notes, take_names, write_notes
from repvgg.deploy.targets import Exported, ExportRequest
from repvgg.deploy.torch_export import silence
from repvgg.errors import ExportError, UsageError, first_line, require

_MAGIC = "7767517"  # first line of a description
_KINDS = Kinds(norms={"BatchNorm"}, sums={"BinaryOp", "Eltwise"})
_NO_OPERATORS = ("Input", "Split")
_MAX_SECONDS = 600


def write(model: nn.Module, path: Path, spec: FileSpec) -> Written:
    """Convert a model with pnnx; in float16, the weights are stored so and ncnn computes as the device can."""
    call = spec.example
    # Not spec.in_precision(): ncnn rounds the weights itself. FlatModule also gives names that pnnx can write.
    flat = FlatModule(model, call)
    converter = Path(require("pnnx", "ncnn").__file__ or "").with_name("pnnx")
    shape = ",".join(map(str, (1, *spec.shape)))
    with TemporaryDirectory() as folder:
        jit: Any = torch.jit  # without types
        with silence(), torch.no_grad():  # a deprecation of tracing
            jit.trace(flat, tuple(call.tensors()), check_trace=False).save(f"{folder}/model.pt")
        # The program itself: its Python wrapper would import the Python code that it generates.
        half = int(spec.precision == "float16")
        command = [str(converter), "model.pt", f"inputshape=[{shape}]", f"fp16={half}", "optlevel=2"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_MAX_SECONDS)
        param, weights = Path(folder) / "model.ncnn.param", Path(folder) / "model.ncnn.bin"
        if done.returncode or not param.is_file() or not weights.is_file():
            raise ExportError(
                f"pnnx cannot convert the model: {first_line(done.stderr or f'exit code {done.returncode}')}."
            )
        text = param.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
        path.with_suffix(".bin").write_bytes(weights.read_bytes())
    # The format has no shape of the input, and its own names: in0, out0, …
    names = names_note(shape=[1, *spec.shape], inputs=flat.inputs, outputs=flat.outputs)
    write_notes(json_beside(path), path.name, {**spec.notes, **names})
    return Written(_inventory(text), 1)


def _inventory(param: str) -> Inventory:
    """Return the layers of a description: ``kind name inputs outputs input… output… key=value…``."""
    operations, inputs = [], []
    for line in param.splitlines()[2:]:
        kind, name, *rest = line.split()
        read, written = int(rest[0]), int(rest[1])
        values = rest[2 : 2 + read + written]
        options = dict(part.split("=", 1) for part in rest[2 + read + written :] if "=" in part)
        if kind == "Input":
            inputs += values
        # 0 is the addition of BinaryOp, 1 that of Eltwise, and their defaults are 0.
        is_sum = (kind == "BinaryOp" and options.get("0", "0") == "0") or (
            kind == "Eltwise" and options.get("0") == "1"
        )
        shown = kind if kind not in _KINDS.sums or is_sum else f"{kind} {options.get('0', '0')}"
        operations.append(Operation(shown, name, values[:read], values[read:]))
    found = take_inventory(operations, inputs, _KINDS)
    counted = {kind: count for kind, count in found.operators.items() if kind not in _NO_OPERATORS}
    return Inventory(counted, found.norms, found.sums)


@final
class NcnnRunner:
    """An ncnn network on the CPU, in float32: ``logits = runner(images)``, one image at a time.

    The attributes are those of :class:`repvgg.deploy.OnnxRunner`.

    Raises:
        ExportError: a file does not exist, or ncnn cannot load it.
        MissingDependencyError: ncnn is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        self._ncnn: Any = require("ncnn", "ncnn")
        weights = path.with_suffix(".bin")
        for file in (path, weights):
            if not file.is_file():
                raise ExportError(f"There is no file {str(file)!r}: export the model first.")
        if path.read_bytes()[: len(_MAGIC)].decode("latin1") != _MAGIC:
            raise ExportError(f"{str(path)!r} is not the description of an ncnn network.")
        self._net = self._ncnn.Net()
        options = self._net.opt
        options.use_vulkan_compute = False
        # As float32 as the reference: by default, ncnn computes in float16 or bfloat16 where the CPU can.
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        options.use_bf16_storage = False
        options.num_threads = threads or torch.get_num_threads()
        if self._net.load_param(str(path)) or self._net.load_model(str(weights)):
            raise ExportError(f"{str(path)!r} cannot be loaded by ncnn: export it again.")
        self._inputs, self._outputs = list(self._net.input_names()), list(self._net.output_names())
        self.notes = read_notes(json_beside(path))
        about = take_names(self.notes, path)
        self.input_shape: tuple[int | None, ...] = tuple(about.get("shape", (1, None, None, None)))
        self.inputs = dict.fromkeys(about.get("inputs", self._inputs), self.input_shape)
        self.outputs: tuple[str, ...] = tuple(about.get("outputs", self._outputs))
        self.dtype = torch.float32

    def __call__(self, *args: Tensor) -> Any:
        """Return the outputs for a batch of one image.

        Raises:
            UsageError: there are more images, or other inputs.
            ExportError: ncnn fails.
        """
        if len(args) != len(self._inputs) or any(len(x) != 1 for x in args):
            raise UsageError(f"{str(self.path)!r} takes one image at a time, {', '.join(self.inputs)}.")
        extractor = self._net.create_extractor()
        # ncnn reads the arrays in place: they live until the end of this call.
        arrays = [np.ascontiguousarray(x[0].detach().numpy()) for x in args]
        for name, array in zip(self._inputs, arrays, strict=True):
            extractor.input(name, self._ncnn.Mat(array))
        values = []
        for name in self._outputs:
            status, found = extractor.extract(name)
            if status:
                raise ExportError(f"ncnn could not run {str(self.path)!r}: it has no memory, or lacks a layer.")
            values.append(torch.from_numpy(np.array(found))[None])
        return values[0] if len(values) == 1 else dict(zip(self.outputs, values, strict=True))


def load(path: Path, threads: int | None = None) -> NcnnRunner:
    """Open a file and the weights next to it."""
    return NcnnRunner(path, threads)


def export(request: ExportRequest) -> Exported:
    """Export a network; see :func:`repvgg.deploy.file_target.export_file`."""
    return export_file("ncnn", request, write, load)
