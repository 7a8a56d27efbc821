"""Plain networks on this CPU: the library's engine compared with other inference engines, in one process.

    python benchmarks/engine.py                                    all pairs of the paper's Table 4, batches 1 and 16
    python benchmarks/engine.py --pairs repvgg_a0:resnet18 --batches 1 --rounds 15
    python benchmarks/engine.py --idle 1,20,100,1000 --pairs repvgg_a0: --batches 1
    python benchmarks/engine.py --busy --pairs repvgg_a0: --batches 1
    python benchmarks/engine.py --pairs vgg16:,resnet18:,resnet50:,mobilenetv2_100:,efficientnet_b0:
    python benchmarks/engine.py --pairs pspnet_repvgg_a0@713: --batches 1 --rounds 5
    python benchmarks/engine.py --checkpoint runs/c10/plain.safetensors --data torchvision:CIFAR10:PATH

A pair is an architecture and a baseline, each followed by ``@SIZE`` for images of another size than ``--size``.
Architectures are those of this library, else of torchvision or timm, collapsed. A network with dilated convolutions
is also compared with itself undilated, which is another function of as many multiplications. First, the best settings
of each other engine are found: PyTorch eager and by ``torch.compile`` (inductor), in either memory format and with or
without constant weights; ONNX Runtime with spinning and with sleeping threads; OpenVINO in float32 with the hints for
latency and for throughput, pinned or not. The library's engine is autotuned, unless ``--no-search``. Then rounds
alternate between the engines, by the protocol of ``repvgg bench``: each reading waits until the threads of the engine
before are idle, runs once untimed, and times calls for 0.1 s or more. The output has medians of images per second with
quartiles, the largest error of the logits against float64 relative to the largest logit, and ratios within rounds: to
the fastest other engine on the same network, and to the baseline in OpenVINO.

``--idle`` times single calls, each after that many milliseconds of rest. ``--busy`` runs another process on one core.
``--checkpoint`` evaluates all engines against float64 on a validation split instead of timing them. ``--floor`` shows
where the time of the engine goes, and what the peaks of the machine alone would take. ``--precision medium`` allows
larger rounding errors; ``--isa avx2`` limits the engines to narrower vectors.

An engine that is not installed is skipped, with a message. Weights are random, except those of a checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import repvgg.engine
from repvgg.deploy import export_onnx
from repvgg.engine.codegen.jit import GENERIC_ISAS, VectorIsa, host_isa
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.planner.algorithms import ERROR_GROWTH_LIMITS
from repvgg.errors import MissingDependencyError, require
from repvgg.measure import REST_SECONDS, Sample, SpeedProtocol, environment, take_samples
from repvgg.measure.timing import quartiles
from repvgg.models import BASELINES, create_model, list_models, load
from repvgg.models.registry import CITYSCAPES_CLASSES, PSPNETS
from repvgg.studies.candidates import deployed, plain_form

READING_SECONDS = 0.1
# Table 4, and B1. The bottlenecks have the strides whose FLOPs the paper counts; torchvision's ResNet-50 is added.
PAIRS = "repvgg_a0:resnet18,repvgg_a1:resnet34,repvgg_a2:resnet50+resnet50_v1_5,repvgg_b1g4:resnet101,repvgg_b1:"
Run = Callable[[Tensor], Tensor]
Shape = tuple[int, int, int, int]


def shape_of(images: Tensor) -> Shape:
    batch, channels, height, width = images.shape
    return batch, channels, height, width


@lru_cache(maxsize=2)
def network(name: str) -> nn.Module:
    """Return a network with random weights as it would be deployed, of this library, torchvision or timm."""
    torch.manual_seed(0)
    if name in PSPNETS:
        return create_model(name, CITYSCAPES_CLASSES, plain=True).eval()
    if name in BASELINES or name in list_models():
        return deployed(name)
    models = require("torchvision").models
    if name in models.list_models():
        return plain_form(models.get_model(name, weights=None).eval())
    return plain_form(require("timm").create_model(name, pretrained=False).eval())


def undilated(model: nn.Module) -> nn.Module | None:
    """Return a copy with every dilation set to 1, and the padding that keeps the size; None if there is no dilation."""
    model, found = deepcopy(model), False
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.dilation != (1, 1):
            part.dilation, found = (1, 1), True
            part.padding = tuple((size - 1) // 2 for size in part.kernel_size)
    return model if found else None


LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def in_torch(model: nn.Module, shape: Shape, threads: int) -> Iterator[tuple[str, Run]]:
    """Yield eager PyTorch in each memory format."""
    for name, layout in LAYOUTS.items():
        yield name, partial(_run_torch, deepcopy(model).to(memory_format=layout), layout)


def in_inductor(model: nn.Module, shape: Shape, threads: int) -> Iterator[tuple[str, Run]]:
    """Yield ``torch.compile`` in each memory format, with weights as inputs and as constants that it may reorder."""
    torch.compiler.reset()
    for (name, layout), freezing in itertools.product(LAYOUTS.items(), (False, True)):
        compiled = torch.compile(deepcopy(model).to(memory_format=layout), options={"freezing": freezing})
        yield f"{name}{', frozen' if freezing else ''}", partial(_run_torch, compiled, layout)


def _run_torch(run: Run, layout: torch.memory_format, x: Tensor) -> Tensor:
    return run(x.contiguous(memory_format=layout))


def in_onnxruntime(model: nn.Module, shape: Shape, threads: int) -> Iterator[tuple[str, Run]]:
    """Yield ONNX Runtime with spinning and with sleeping threads."""
    runtime = require("onnxruntime")
    for spin in ("1", "0"):
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)
        session = runtime.InferenceSession(_exported(model, shape[1:]), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        words = "threads spin" if spin == "1" else "threads sleep"
        yield words, partial(_run_onnxruntime, session, name)


def _run_onnxruntime(session: Any, name: str, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def in_openvino(model: nn.Module, shape: Shape, threads: int) -> Iterator[tuple[str, Run]]:
    """Yield OpenVINO in float32 for each performance hint, with and without CPU pinning."""
    core = require("openvino", "openvino").Core()
    graph = core.read_model(_exported(model, shape[1:]), b"")
    graph.reshape(list(shape))
    for hint, pinned in itertools.product(("LATENCY", "THROUGHPUT"), (False, True)):
        settings = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": pinned}
        settings["INFERENCE_NUM_THREADS"] = threads
        if hint == "THROUGHPUT":
            settings["NUM_STREAMS"] = "1"  # there is a single caller: all threads work on its images
        request = core.compile_model(graph, "CPU", settings).create_infer_request()
        words = f"{hint.lower()}{', pinned' if pinned else ''}"
        yield words, partial(_run_openvino, request)


def _run_openvino(request: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])


OTHERS = {
    "PyTorch": in_torch,
    "torch.compile": in_inductor,
    "ONNX Runtime": in_onnxruntime,
    "OpenVINO f32": in_openvino,
}


@lru_cache(maxsize=1)  # several engines and batches read the same file
def _exported(model: nn.Module, image: tuple[int, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.onnx"
        export_onnx(model, path, image)  # type: ignore[arg-type]
        return path.read_bytes()


def readings(runs: Mapping[str, Run], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Measure images per second, in turns, as ``repvgg bench`` does: after a rest and an untimed call."""
    protocol = SpeedProtocol(
        rounds=rounds,
        warmup_calls=1,
        warmup_seconds=0.0,
        min_round_seconds=READING_SECONDS,
        rest_seconds=REST_SECONDS,
    )
    speeds: dict[str, list[float]] = {name: [] for name in runs}

    def keep(sample: Sample) -> None:
        for name, seconds in sample.items():
            speeds[name].append(len(images) / seconds)

    take_samples({name: partial(run, images) for name, run in runs.items()}, protocol, keep)
    return speeds


def best_settings(model: nn.Module, images: Tensor, args: argparse.Namespace, names: Sequence[str]) -> dict[str, Run]:
    """Return each other engine with the setting of the highest median of some readings."""
    found: dict[str, Run] = {}
    for name in names:
        try:
            settings = dict(OTHERS[name](model, shape_of(images), args.threads))
        except MissingDependencyError as error:
            print(f"{name} is skipped: {error}")
            continue
        speeds = readings(settings, images, args.trials)
        best = max(speeds, key=lambda words: float(np.median(speeds[words])))
        print(f"  {name}:", ", ".join(f"{words} {np.median(speeds[words]):.1f}" for words in speeds))
        found[f"{name} ({best})"] = settings[best]
    return found


def after_rest(runs: dict[str, Run], images: Tensor, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Measure images per second of single calls, each after the whole process has slept."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(images)
            time.sleep(seconds)
            start = time.perf_counter()
            run(images)
            speeds[name].append(len(images) / (time.perf_counter() - start))
    return speeds


def show(name: str, values: Sequence[float], words: str = "") -> None:
    low, median, high = quartiles(list(values))
    print(f"  {name:44s} {median:8.2f} ({low:.2f}-{high:.2f}) {words}", flush=True)


def ratios(speeds: dict[str, list[float]], ours: str, other: str) -> list[float]:
    """Divide readings of the same round."""
    return [one / two for one, two in zip(speeds[ours], speeds[other], strict=True)]


def compare(speeds: dict[str, list[float]], ours: str, baselines: Sequence[str]) -> None:
    """Print the ratios to the fastest other engine and to the baselines."""
    rivals = [name for name in speeds if name not in (ours, *baselines)]
    if rivals:
        best = max(rivals, key=lambda name: float(np.median(speeds[name])))
        show("ratio", ratios(speeds, ours, best), f"to {best}")
    for baseline in baselines:
        show("ratio", ratios(speeds, ours, baseline), f"to {baseline}")


def errors(runs: dict[str, Run], model: nn.Module, images: Tensor) -> dict[str, float]:
    """Compute the largest error of the logits against float64, relative to the largest logit."""
    wanted = deepcopy(model).double()(images.double())
    return {name: float((run(images) - wanted).abs().max() / wanted.abs().max()) for name, run in runs.items()}


def limited(name: str) -> VectorIsa:
    """Return this processor with narrower vector instructions, and limit the other engines to them as far as they go.

    oneDNN, in PyTorch and OpenVINO, and PyTorch's own kernels read environment variables; ONNX Runtime has no switch.
    """
    os.environ["ONEDNN_MAX_CPU_ISA"], os.environ["ATEN_CPU_CAPABILITY"] = name.upper(), name
    generic, host = GENERIC_ISAS[name], host_isa()
    without = ",".join(f"-{each[1:]}" if each.startswith("+avx512") else each for each in host.features.split(","))
    return replace(generic, cpu=host.cpu, features=without)


def ours(model: nn.Module, shape: Shape, args: argparse.Namespace) -> CompiledModel:
    """Compile, with autotuning by default."""
    search = not args.no_search
    return CompiledModel(read(model, [shape]), [shape], args.vectors, args.threads, args.precision, search)


def floor(model: nn.Module, shape: Shape, args: argparse.Namespace) -> None:
    """Print the time by kind of kernel, and how long this machine's peaks would take."""
    threads = args.threads
    network = ours(model, shape, args)
    images = torch.randn(shape)
    network(images)
    by_kernel: dict[str, list[float]] = {}
    for step in network.profile(images, repeats=30):
        by_kernel.setdefault(type(step.kernel).__name__, []).append(step.seconds)
    total = sum(map(sum, by_kernel.values()))
    for name, seconds in by_kernel.items():
        print(f"  {name:20s} {len(seconds):3d} steps {1e3 * sum(seconds):8.2f} ms {sum(seconds) / total:6.1%}")
    multiplies = sum(step.num_multiplies for step in network.profile(images, repeats=1))
    bytes_read = sum(values.nbytes for values in network._executables[-1]._weights)
    peak, bandwidth = peak_flops(threads), bandwidth_read(bytes_read)
    print(
        f"  all steps {1e3 * total:.2f} ms; {2e-9 * multiplies:.2f} GFLOP after Winograd over {1e-9 * peak:.0f} GFLOP/s"
    )
    print(f"  measured: {1e3 * 2 * multiplies / peak:.2f} ms; {1e-6 * bytes_read:.0f} MB of weights over", end=" ")
    print(f"{1e-9 * bandwidth:.0f} GB/s measured: {1e3 * bytes_read / bandwidth:.2f} ms")


def peak_flops(threads: int) -> float:
    """Measure FLOP/s of the engine's direct kernel on layers that stay in L2, the best of many runs."""
    layers = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)]
    network = repvgg.engine.compile(nn.Sequential(*layers).eval(), (1, 64, 56, 56), threads, precision="highest")
    images = torch.randn(1, 64, 56, 56)
    return max(
        2 * step.num_multiplies / step.seconds
        for _ in range(20)
        for step in network.profile(images, repeats=5)
        if step.num_multiplies
    )


def bandwidth_read(size: int) -> float:
    """Measure bytes per second of a sum over ``size`` bytes, the best of many runs."""
    values = torch.ones(max(size // 4, 1))
    return size / min(_timed(values.sum) for _ in range(20))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def evaluate(args: argparse.Namespace) -> None:
    """Compare all engines with float64 on a validation split."""
    from repvgg.data import DataConfig, open_data

    loaded = load(args.checkpoint)
    metadata, model = loaded.metadata, loaded.model.eval()
    config = DataConfig(
        uri=args.data,
        train_size=metadata.input_size,
        test_size=metadata.input_size,
        mean=metadata.mean or None,
        std=metadata.std or None,
    )
    opened = open_data(config)
    batches = [opened.prepare(images) for images, _ in opened.val_batches(64)]
    batches = [images for images in batches if len(images) == 64]
    shape = shape_of(batches[0])
    exact = torch.cat([deepcopy(model).double()(images.double()) for images in batches])
    runs: dict[str, Run] = {"repvgg": ours(model, shape, args)}
    runs |= {name: next(make(model, shape, args.threads))[1] for name, make in OTHERS.items()}
    print(f"{args.checkpoint}: {len(exact):,} images of {shape[2]}x{shape[3]}")
    for name, run in runs.items():
        found = torch.cat([run(images).clone() for images in batches])
        error = float((found - exact).abs().max() / exact.abs().max())
        same = int((found.argmax(1) == exact.argmax(1)).sum())
        print(f"  {name:14s} error {error:.1e}, {same:,} of {len(exact):,} top-1 as in float64")


def _work() -> None:
    while True:
        sum(range(10**6))


@contextmanager
def background_load(busy: bool) -> Iterator[None]:
    """Keep another process busy in the background."""
    process = multiprocessing.get_context("spawn").Process(target=_work, daemon=True)
    if busy:
        process.start()
    yield
    if busy:
        process.terminate()


@torch.inference_mode()
def measure(architecture: str, baseline: str, batch: int, args: argparse.Namespace) -> dict[str, object]:
    """Measure one pair at one batch size."""
    architecture, _, given = architecture.partition("@")
    model, size = network(architecture), int(given or args.size)
    images = torch.randn(batch, 3, size, size)
    print(f"{architecture}, batch {batch}, {size}x{size}")
    start = time.perf_counter()
    runs: dict[str, Run] = {"repvgg": ours(model, shape_of(images), args)}
    searched = "out" if args.no_search else ""
    print(f"  repvgg: compiled in {time.perf_counter() - start:.1f} s with{searched} autotuning")
    runs |= best_settings(model, images, args, args.engines)
    max_errors = errors(runs, model, images)
    rivals = []
    if (other := undilated(model)) is not None:
        rivals.append("repvgg, undilated")
        runs[rivals[0]] = ours(other, shape_of(images), args)
    for name in filter(None, baseline.split("+")):
        print(f"  {name}:")
        found = best_settings(network(name), images, args, ["OpenVINO f32"])
        rivals += [f"{name} in {engine}" for engine in found]
        runs |= {f"{name} in {engine}": run for engine, run in found.items()}
    results: dict[str, object] = {"model": architecture, "baseline": baseline, "batch": batch, "errors": max_errors}
    with background_load(args.busy):
        for rest in args.idle or [None]:
            if rest is None:
                speeds = readings(runs, images, args.rounds)
            else:
                print(f"  after {rest:g} ms of rest:")
                speeds = after_rest(runs, images, rest / 1e3, args.rounds)
            for name, values in speeds.items():
                show(name, values, f"img/s{f', error {max_errors[name]:.1e}' if name in max_errors else ''}")
            compare(speeds, "repvgg", rivals)
            results["speeds" if rest is None else f"speeds after {rest:g} ms"] = speeds
    if args.floor:
        floor(model, shape_of(images), args)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", default=PAIRS, help="architectures, each followed by a colon and its baselines, joined by +"
    )
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--engines", default=",".join(OTHERS))
    parser.add_argument("--isa", default="", help="narrower vector instructions: avx2; sets oneDNN's limit, too")
    parser.add_argument("--idle", default="", help="milliseconds, separated by commas")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--no-search", action="store_true", help="select algorithms by the cost model alone")
    parser.add_argument("--json", type=Path, help="write all readings to this file")
    parser.add_argument("--precision", default="high", choices=tuple(ERROR_GROWTH_LIMITS), help="of the engine")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data")
    for name, default in (("threads", 2), ("rounds", 15), ("trials", 5), ("size", 224)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.engines, args.idle = args.engines.split(","), [float(rest) for rest in args.idle.split(",") if rest]
    torch.set_num_threads(args.threads)
    args.vectors = limited(args.isa) if args.isa else host_isa()
    print(environment(), args.isa, flush=True)
    if args.checkpoint:
        with torch.inference_mode():
            evaluate(args)
        return
    results = []
    for pair, batch in itertools.product(args.pairs.split(","), map(int, args.batches.split(","))):
        architecture, _, baseline = pair.partition(":")
        results.append(measure(architecture, baseline, batch, args))
        torch.compiler.reset()
        if args.json:
            args.json.write_text(json.dumps({"environment": environment(), "results": results}))


if __name__ == "__main__":
    main()
