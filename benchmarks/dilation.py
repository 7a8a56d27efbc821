"""A dilated PSPNet against the same network by phases, in one process: what ``repvgg.dilate_by_phases`` is worth.

    python benchmarks/dilation.py                                       pspnet_repvgg_a0 at 713x713
    python benchmarks/dilation.py --model pspnet_repvgg_a0 --size 361 --rounds 9 --threads 2

Three forms of the plain network with random weights: dilated; by phases, which computes the same; and undilated, the
arithmetic of both with dilation 1, which is another function and the aim. Each runs in PyTorch eager, ONNX Runtime,
OpenVINO (float32) and the library's engine. A runtime that is not installed, or does not take the network, is left out,
and the reason is printed. "stages" times the dilated stages alone. The engine mixes no images of a batch, which phases
are: there, it runs the layers before, on and after the phases, and PyTorch splits the map into phases and joins them.

Rounds alternate between all of them: every round times each once, and starts with the next one; a call of less than a
second is made untimed first. ``--clock cpu`` takes the CPU time of the process, which other programs disturb less; take
it with one thread only. The output has medians and quartiles of milliseconds a call, the time of the dilated form
divided by that of each form within rounds (above 1: that form is faster), and the largest error against the dilated
network in float64, relative to its largest output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repvgg
import repvgg.engine
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.errors import RepvggError, require
from repvgg.measure import environment
from repvgg.measure.timing import quartiles
from repvgg.models import PhaseImages, create_model
from repvgg.models.registry import CITYSCAPES_CLASSES

Run = Callable[[Tensor], Tensor]
Runs = dict[tuple[str, str], Run]  # by runtime and form
FORMS = ("dilated", "by phases", "undilated")
PARTS = ("network", "stages")
DILATED_STAGES = 2  # the index of the first: a classifier has stride 8 before it
READING_SECONDS = 0.2
LONG_CALL_SECONDS = 1.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
REST_SECONDS = 0.05  # until the threads of the runtime before are idle


class EngineLayers(nn.Module):
    """Layers that the engine runs, compiled for each size of maps that arrives."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.compiled: dict[tuple[int, ...], Run] = {}

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape)
        if size not in self.compiled:
            self.compiled[size] = repvgg.engine.compile(self.layers, size)
        return self.compiled[size](x)


class Heads(nn.Module):
    """What a PSPNet does with the last feature map, for images of one size."""

    def __init__(self, model: nn.Module, size: torch.Size) -> None:
        super().__init__()
        self.pyramid, self.head = model.get_submodule("pyramid"), model.get_submodule("head")
        self.size = (int(size[0]), int(size[1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.pyramid(x)), self.size, mode="bilinear", align_corners=True)


def stages_of(model: nn.Module) -> nn.Sequential:
    """Return the stages with dilation, for the feature map before them."""
    stages = list(model.get_submodule("backbone.stages"))
    return nn.Sequential(*stages[DILATED_STAGES:]).eval()


def map_before(model: nn.Module, x: Tensor) -> Tensor:
    """Return the feature map that enters the dilated stages."""
    return model.get_submodule("backbone").features(x)[DILATED_STAGES]


def undilated(model: nn.Module) -> nn.Module:
    """Set every dilation to 1, in place, with the padding that keeps the size."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.dilation != (1, 1):
            part.dilation = (1, 1)
            part.padding = tuple((size - 1) // 2 for size in part.kernel_size)
    return model


def forms_of(name: str) -> dict[str, nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return create_model(name, CITYSCAPES_CLASSES, plain=True).eval()

    phases, report = repvgg.dilate_by_phases(make())
    print(report)
    return dict(zip(FORMS, (make(), phases, undilated(make())), strict=True))


def in_torch(model: nn.Module, x: Tensor, threads: int) -> Run:
    return model


def in_onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, Path(folder) / "model.onnx", tuple(x.shape[1:])).path  # type: ignore[arg-type]
        return OnnxRunner(path, threads)


def in_openvino(model: nn.Module, x: Tensor, threads: int) -> Run:
    core = require("openvino", "openvino").Core()
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, tuple(x.shape[1:]))  # type: ignore[arg-type]
        graph = core.read_model(path.read_bytes(), b"")
    graph.reshape(list(x.shape))
    request = core.compile_model(graph, "CPU", hints).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0])


def in_engine(model: nn.Module, x: Tensor, threads: int) -> Run:
    if not any(isinstance(part, PhaseImages) for part in model.modules()):
        return repvgg.engine.compile(model, x.shape)
    if isinstance(model, nn.Sequential):
        return phases_in_engine(model)
    backbone = model.get_submodule("backbone")
    before = nn.Sequential(backbone.get_submodule("stem"), *list(backbone.get_submodule("stages"))[:DILATED_STAGES])
    first, stages = repvgg.engine.compile(before.eval(), x.shape), phases_in_engine(stages_of(model))
    last = repvgg.engine.compile(Heads(model, x.shape[2:]).eval(), stages(first(x)).shape)
    return lambda images: last(stages(first(images)))


def phases_in_engine(stages: nn.Sequential) -> nn.Module:
    """Return stages by phases whose layers the engine runs."""
    stages = deepcopy(stages)
    for path, part in list(stages.named_modules()):
        if isinstance(part, PhaseImages):
            stages.set_submodule(path, PhaseImages([EngineLayers(nn.Sequential(*part).eval())], part.dilation))
    return stages


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Run]] = {
    "torch": in_torch,
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
    "repvgg": in_engine,
}


def prepared(networks: dict[str, nn.Module], x: Tensor, threads: int, runtimes: list[str]) -> Runs:
    """Return the networks in each runtime that takes all of them, by (runtime, form)."""
    found: Runs = {}
    for runtime in runtimes:
        try:
            runs = {(runtime, form): RUNTIMES[runtime](model, x, threads) for form, model in networks.items()}
            for run in runs.values():
                run(x)
        except RepvggError as error:
            print(f"{runtime}: left out: {error}")
            continue
        found |= runs
    return found


def seconds_of(run: Run, x: Tensor, clock: Callable[[], float]) -> float:
    """Return the mean seconds of a call, after a rest and, for short calls, an untimed one."""
    time.sleep(REST_SECONDS)
    begin = clock()
    run(x)
    first = clock() - begin
    if first > LONG_CALL_SECONDS:  # caches are cold for a small part of it only
        return first
    calls, begin = 0, clock()
    while calls == 0 or clock() - begin < READING_SECONDS:
        run(x)
        calls += 1
    return (clock() - begin) / calls


def measured(runs: Runs, x: Tensor, rounds: int, clock: Callable[[], float]) -> list[dict[tuple[str, str], float]]:
    names = list(runs)
    return [
        {name: seconds_of(runs[name], x, clock) for name in names[index % len(names) :] + names[: index % len(names)]}
        for index in range(rounds)
    ]


def errors_of(runs: Runs, dilated: nn.Module, x: Tensor) -> dict[tuple[str, str], float]:
    """Return the largest error against the dilated network in float64; "undilated" is another function."""
    expected = dilated.double()(x.double())
    dilated.float()
    largest = expected.abs().max()
    return {
        name: float((run(x).double() - expected).abs().max() / largest)
        for name, run in runs.items()
        if name[1] != "undilated"
    }


def compare(title: str, networks: dict[str, nn.Module], x: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    how = f"{arguments.threads} threads, {arguments.rounds} rounds, {arguments.clock} time"
    print(f"\n{title}, input {tuple(x.shape)}, {how}", flush=True)
    runs = prepared(networks, x, arguments.threads, arguments.runtimes)
    errors = errors_of(runs, networks["dilated"], x)
    rounds = measured(runs, x, arguments.rounds, CLOCKS[arguments.clock])
    results: dict[str, Any] = {}
    print(f"{'runtime':12} {'form':10} {'ms':>9} {'quartiles':>20} {'dilated / this':>26} {'error':>9}")
    for runtime, form in runs:
        times = [1e3 * one[runtime, form] for one in rounds]
        ratios = [one[runtime, "dilated"] / one[runtime, form] for one in rounds]
        q1, middle, q3 = quartiles(times)
        r1, ratio, r3 = quartiles(ratios)
        error = errors.get((runtime, form))
        results[f"{runtime}, {form}"] = {
            "milliseconds": middle,
            "quartiles": [q1, q3],
            "dilated_over_this": ratio,
            "ratio_quartiles": [r1, r3],
            "error": error,
        }
        spread = f"{q1:.1f} – {q3:.1f}"
        ratios_text = f"{ratio:.2f} ({r1:.2f} – {r3:.2f})"
        shown = "" if error is None else f"{error:.1e}"
        print(f"{runtime:12} {form:10} {middle:9.1f} {spread:>20} {ratios_text:>26} {shown:>9}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pspnet_repvgg_a0", help="a segmentation model of 'repvgg list'")
    parser.add_argument("--size", type=int, default=713, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = torch.randn(1, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(0))
    machine = environment()
    results: dict[str, Any] = {}
    with torch.inference_mode():
        networks = forms_of(arguments.model)
        if "network" in arguments.parts:
            results["network"] = compare(arguments.model, networks, x, arguments)
        if "stages" in arguments.parts:
            before = map_before(networks["dilated"], x).contiguous()
            parts = {form: stages_of(model) for form, model in networks.items()}
            results["stages"] = compare(f"dilated stages of {arguments.model}", parts, before, arguments)
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
