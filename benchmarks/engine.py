"""A plain network on this CPU: the engine of repvgg beside other engines, in one process.

    python benchmarks/engine.py [--model repvgg_a0] [--batch 1] [--threads 2] [--rounds 15] [--size 224]

Rounds alternate between the engines; each round times calls for about a tenth of a second. Shown for each engine: the
median of images per second with quartiles, and the largest error of the logits against float64, relative to the
largest logit. "ratio" is that of the engine to the fastest other one, the median over the rounds with quartiles. An
engine that is not installed is left out, and named. Weights and images are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import repvgg.engine
from repvgg import create_model
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.errors import MissingDependencyError, require
from repvgg.measure import environment
from repvgg.measure.latency import quartiles

READING = 0.1  # seconds
Engine = Callable[[Tensor], Tensor]


def openvino(path: Path, shape: tuple[int, ...], threads: int) -> Engine:
    """OpenVINO in float32, for latency, which was its best hint for one caller."""
    core = require("openvino", "openvino").Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


def engines(model: nn.Module, shape: tuple[int, int, int, int], threads: int) -> dict[str, Engine]:
    """All that can be had here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.onnx"
        export_onnx(model, path, shape[1:])
        makers: dict[str, Callable[[], Engine]] = {
            "repvgg": lambda: repvgg.engine.compile(model, shape, threads),
            "PyTorch": lambda: model,
            "ONNX Runtime": lambda: OnnxRunner(path, threads),
            "OpenVINO f32": lambda: openvino(path, shape, threads),
        }
        found = {}
        for name, make in makers.items():
            try:
                found[name] = make()
            except MissingDependencyError as error:
                print(f"{name} is left out: {error}")
        return found


def speed(engine: Engine, images: Tensor) -> float:
    """Images per second over one reading."""
    start, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < READING:
        engine(images)
        calls += 1
    return calls * len(images) / passed


def show(name: str, values: list[float], words: str) -> None:
    low, median, high = quartiles(values)
    print(f"{name:14s} {median:8.2f} ({low:.2f}–{high:.2f}) {words}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="repvgg_a0")
    for name, default in (("batch", 1), ("threads", 2), ("rounds", 15), ("size", 224)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = create_model(args.model, plain=True).eval()
    images = torch.randn(args.batch, 3, args.size, args.size)
    exact = create_model(args.model, plain=True).double().eval()
    exact.load_state_dict(model.state_dict())
    wanted = exact(images.double())
    print(environment())
    found = engines(model, tuple(images.shape), args.threads)
    speeds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, engine in found.items():
            speeds[name].append(speed(engine, images))
    for name, engine in found.items():
        error = (engine(images) - wanted).abs().max() / wanted.abs().max()
        show(name, speeds[name], f"img/s, error {error:.1e}")
    others = [speeds[name] for name in found if name != "repvgg"]
    best = max(others, key=lambda values: quartiles(values)[1])
    show("ratio", [ours / theirs for ours, theirs in zip(speeds["repvgg"], best, strict=True)], "to the best other")


if __name__ == "__main__":
    main()
