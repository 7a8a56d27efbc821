"""What runs a network while it is timed.

An engine takes a model, a setting and the shape of an image, and returns what takes images. Another one is a function
and a row in the table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

import repvgg.engine
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.engine.frontend import read
from repvgg.errors import UsageError, require
from repvgg.measure import RunSettings

Shape: TypeAlias = tuple[int, int, int]
Run: TypeAlias = Callable[[Tensor], object]


@dataclass(frozen=True)
class Engine:
    """One that can be asked for.

    Attributes:
        prepare: makes a model ready: (model, setting, shape of an image) to what takes images.
        check: raises UnsupportedError, with the reason, for a model that it cannot run; cheap.
        anywhere: whether it runs on any device and in any numbers; else in float32 on the CPU.
    """

    prepare: Callable[[nn.Module, RunSettings, Shape], Run]
    check: Callable[[nn.Module], object]
    anywhere: bool = False


def _anything(model: nn.Module) -> None:
    """Every model will do."""


def _in_torch(model: nn.Module, setting: RunSettings, image: Shape) -> Run:
    """The model itself, moved where the setting says, and compiled if it says so."""
    return setting.place(model)


def _in_repvgg(model: nn.Module, setting: RunSettings, image: Shape) -> Run:
    """The library's own engine; larger batches are compiled for when they come."""
    network = repvgg.engine.compile(model.eval(), (1, *image))
    return lambda x: network(x)


def _in_repvgg_searched(model: nn.Module, setting: RunSettings, image: Shape) -> Run:
    """The same; for each batch size, the ways to compute each convolution are measured first."""
    return _for_each_batch(lambda x: repvgg.engine.compile(model.eval(), x.shape, search=True))


def _for_each_batch(prepare: Callable[[Tensor], Run]) -> Run:
    """What is made ready for each batch size on its own, when images of that size come first."""
    runs: dict[int, Run] = {}

    def run(x: Tensor) -> object:
        if len(x) not in runs:
            runs[len(x)] = prepare(x)
        return runs[len(x)](x)

    return run


def _in_onnxruntime(model: nn.Module, setting: RunSettings, image: Shape) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model.eval(), path, image)
        return OnnxRunner(path, torch.get_num_threads())


def _in_openvino(model: nn.Module, setting: RunSettings, image: Shape) -> Run:
    """In float32, with the hint for latency, for each batch size on its own: so it is fastest."""
    core = require("openvino", "openvino").Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    hints["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model.eval(), path, image)
        content = path.read_bytes()

    def prepare(images: Tensor) -> Run:
        graph = core.read_model(content, b"")
        graph.reshape(list(images.shape))
        request = core.compile_model(graph, "CPU", hints).create_infer_request()
        return lambda x: request.infer([x.contiguous().numpy()], share_inputs=True)[0]

    return _for_each_batch(prepare)


#: PyTorch takes everything; the library's own engine takes plain networks.
ENGINES: dict[str, Engine] = {
    "torch": Engine(_in_torch, _anything, anywhere=True),
    "repvgg": Engine(_in_repvgg, read),
    "repvgg-searched": Engine(_in_repvgg_searched, read),
    "onnxruntime": Engine(_in_onnxruntime, _anything),
    "openvino": Engine(_in_openvino, _anything),
}


def check_engines(names: Sequence[str], setting: RunSettings) -> None:
    """Refuse names of no engine, and settings that one of them has no way to follow.

    Raises:
        UsageError: the text names the engine.
    """
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"There is no engine {name!r}: there are {', '.join(ENGINES)}.")
        if not ENGINES[name].anywhere and (setting.device, setting.dtype) != ("cpu", "float32"):
            raise UsageError(f"The engine {name!r} computes in float32 on the CPU: leave out --device and --dtype.")
    if not names or len(set(names)) < len(names):
        raise UsageError("Name the engines, each once.")
