"""Training steps per second of a RepVGG architecture, compared with timm's and with the same net without branches.

    python benchmarks/training.py [--model repvgg_a0 --size 160 --batch 16 --rounds 30 --threads 2]
                                  [--settings channels_last:bf16:eager ...] [--sections speed lightning]
                                  [--json training.json]

A step is forward, backward and SGD with momentum, in the same loop for all models. Each model first runs alone, in its
own process, at every setting of memory format, AMP and torch.compile: that finds its best setting and the peak memory
of the process (Linux), and survives crashes. timm's RepVGG in channels_last crashes on x86 CPUs in oneDNN's weight
gradient of strided 1x1 convolutions, and compiled it takes that path in any format. A setting that corrupts memory,
according to glibc's checker, is excluded even if the process survives. The best settings then run round by round in one
process; ratios are taken within a round. The section ``lightning`` compares ``repvgg.training.fit`` with a hand-written
loop over the same model and data. Other load on the machine distorts the numbers, more so with two threads. Needs the
extra ``timm``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from repvgg.blocks import fused
from repvgg.data import DataConfig, ImageData, open_data
from repvgg.measure import environment
from repvgg.models import ModelSpec, create_model, spec_of
from repvgg.training import TrainConfig, fit, recipe_of, seeded
from repvgg.training.optim import build_optimizer

MODELS = ("repvgg", "timm", "no branches")
SETTINGS = [
    ":".join(parts)
    for parts in itertools.product(("contiguous", "channels_last"), ("float32", "bf16"), ("eager", "compile"))
]
# Required ratios of throughput: over timm, of the net without branches, of the hand-written loop.
OVER_TIMM, OF_NO_BRANCHES, OF_PLAIN_LOOP = 1.15, 0.9, 0.95
SECTIONS = ("speed", "lightning")
CLASSES, TRIAL_STEPS, TRIAL_LIMIT_SECONDS = 1000, 12, 600


def without_branches(spec: ModelSpec) -> nn.Sequential:
    """Build the architecture with conv3x3, BN and ReLU in place of every block."""
    channels, layers = 3, nn.Sequential()
    for stage in (spec.stem, *spec.stages):
        for position in range(stage.depth):
            stride = stage.stride if position == 0 else 1
            conv = nn.Conv2d(channels, stage.channels, 3, stride, 1, bias=False)
            layers.extend((conv, nn.BatchNorm2d(stage.channels), nn.ReLU(inplace=True)))
            channels = stage.channels
    return layers.extend((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)))


def timm_model(spec: ModelSpec) -> nn.Module:
    """Build timm's model of that name, or its class with our stages if it has none."""
    import timm
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    if timm.is_model(spec.name):
        return timm.create_model(spec.name, num_classes=CLASSES)
    blocks = tuple(ByoBlockCfg("rep", d=stage.depth, c=stage.channels, s=stage.stride, gs=0) for stage in spec.stages)
    net = ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=spec.stem.channels), num_classes=CLASSES)
    for conv in (part for part in net.stem.modules() if isinstance(part, nn.Conv2d)):
        conv.stride = (spec.stem.stride, spec.stem.stride)
    return net


def make_step(name: str, setting: str, spec: ModelSpec, size: int, batch: int) -> Callable[[], object]:
    """Return a function that takes one training step on fixed random images."""
    torch.manual_seed(0)
    layout, amp, mode = setting.split(":")
    makers = {
        "repvgg": lambda: create_model(spec),
        "timm": lambda: timm_model(spec),
        "no branches": lambda: without_branches(spec),
    }
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = makers[name]().to(memory_format=memory_format).train()
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=memory_format)
    labels = torch.randint(0, CLASSES, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    run = torch.compile(model) if mode == "compile" else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_per_step(step: Callable[[], object], times: int = 2) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def trial(name: str, setting: str, spec: ModelSpec, size: int, batch: int) -> dict[str, float]:
    """Measure the median seconds per step and the peak memory in this process."""
    step = make_step(name, setting, spec, size, batch)
    step()
    step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which includes the imports
    before = resident_mebibytes("VmRSS")
    times = [seconds_per_step(step, 1) for _ in range(TRIAL_STEPS)]
    return {"seconds": statistics.median(times), "peak": resident_mebibytes("VmHWM"), "resident": before}


def resident_mebibytes(which: str) -> float:
    """Return the resident set of this process on Linux: now ("VmRSS") or its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) / 1024


def trials(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, float] | None]]:
    """Run every model at every setting in its own process; None where it crashed."""
    found: dict[str, dict[str, dict[str, float] | None]] = {name: {} for name in MODELS}
    print(f"{'alone':14}{'setting':30}{'img/s':>8}{'peak MiB':>10}")
    for name, setting in itertools.product(MODELS, arguments.settings):
        own = [sys.executable, __file__, "--trial", name, setting, *common(arguments)]
        try:
            run = subprocess.run(own, capture_output=True, text=True, check=False, timeout=TRIAL_LIMIT_SECONDS)
            outcome = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None
            failure = f"crashed ({run.returncode})"
            if outcome and not heap_is_sound(own):
                outcome, failure = None, "corrupts memory, without crashing"
        except subprocess.TimeoutExpired:
            outcome, failure = None, f"not finished within {TRIAL_LIMIT_SECONDS} s"
        found[name][setting] = outcome
        shown = f"{arguments.batch / outcome['seconds']:8.1f}{outcome['peak']:10.0f}" if outcome else failure.rjust(8)
        print(f"{name:14}{setting:30}{shown}", flush=True)
    return found


def heap_is_sound(command: list[str]) -> bool:
    """Return whether the same process succeeds while glibc checks each heap block; True where there is no checker."""
    checker = next(Path("/").glob("usr/lib*/**/libc_malloc_debug.so.0"), None)
    if checker is None:
        return True
    environment = {**os.environ, "LD_PRELOAD": str(checker), "MALLOC_CHECK_": "3"}
    run = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=TRIAL_LIMIT_SECONDS)
    return run.returncode == 0


def common(arguments: argparse.Namespace) -> list[str]:
    names = ("model", "size", "batch", "threads")
    return [text for name in names for text in (f"--{name}", str(getattr(arguments, name)))]


def duel(best: dict[str, str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Measure seconds per step of each model at its best setting, round by round."""
    spec = spec_of(arguments.model)
    steps = {name: make_step(name, setting, spec, arguments.size, arguments.batch) for name, setting in best.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        seconds_per_step(step, 3)
    gc.collect()
    gc.disable()  # a collection would count for the model that happens to run
    names = list(steps)
    for index in range(arguments.rounds):
        # Rotated, so that the order does not favour one of them.
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(seconds_per_step(steps[name]))
    gc.enable()
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speed(arguments: argparse.Namespace) -> dict[str, object]:
    """Run the section ``speed``: throughput and memory of the models, and whether the required ratios are met."""
    found = trials(arguments)
    best = {
        name: min((setting for setting in tried if tried[setting]), key=lambda s: tried[s]["seconds"])
        for name, tried in found.items()
        if any(tried.values())
    }
    times = duel(best, arguments)
    rows = {}
    print(f"\n{'side by side':14}{'setting':30}{'img/s (quartiles)':26}{'speed-up of repvgg'}")
    for name, setting in best.items():
        low, middle, high = (arguments.batch / value for value in reversed(quartiles(times[name])))
        ratios = quartiles([other / own for own, other in zip(times["repvgg"], times[name], strict=True)])
        rows[name] = {"setting": setting, "images_per_second": [low, middle, high], "ratio": list(ratios)}
        shown = f"{ratios[1]:.2f} ({ratios[0]:.2f}-{ratios[2]:.2f})"
        print(f"{name:14}{setting:30}{f'{middle:.1f} ({low:.1f}-{high:.1f})':26}{shown}")
    for name, wanted in (("timm", OVER_TIMM), ("no branches", OF_NO_BRANCHES)):
        if name in rows:
            ratio = rows[name]["ratio"][1]
            print(f"{ratio:.2f} of {name}, required {wanted}: {'reached' if ratio >= wanted else 'NOT reached'}")
    return {"trials": found, "best": rows}


def plain_loop_epochs(config: TrainConfig, data: ImageData, epochs: int) -> list[float]:
    """Return images per second of each epoch of a hand-written training loop over the same model and data."""
    with seeded("model", config.seed):
        model = create_model(config.model, len(data.classes), data.input_shape[0]).train()
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    loader = data.train_batches(config.batch_size)
    total = epochs * len(loader)
    optimizer, schedule = build_optimizer(model, config.optim, total, 0)
    speeds = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        start, images = time.perf_counter(), 0
        for batch, labels in loader:
            x = data.prepare(batch).contiguous(memory_format=layout)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                output = model(x)
                loss = F.cross_entropy(output, labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            images += len(labels)
        speeds.append(images / (time.perf_counter() - start))
    return speeds


def lightning_overhead(rounds: int, threads: int) -> dict[str, Any]:
    """Compare ``fit`` with the hand-written loop: alternating runs of two epochs, the first to warm up."""
    recipe = recipe_of("cifar")
    config = replace(
        recipe,
        model="repvgg_t1",
        epochs=2,
        progressive=(),
        ema=0.0,
        threads=threads,
        dry_run=False,
        data=DataConfig(uri="fake:2048x10"),
        optim=replace(recipe.optim, warmup_epochs=0.0),
    )
    data = open_data(config.data)
    ratios, ours, theirs = [], [], []
    for _ in range(rounds):
        with seeded("model", config.seed):
            model = create_model(config.model, len(data.classes), data.input_shape[0])
        ours.append(fit(model, data, config, progress=False).history[-1].images_per_second)
        theirs.append(plain_loop_epochs(config, data, 2)[-1])
        ratios.append(ours[-1] / theirs[-1])
    q1, median, q3 = statistics.quantiles(ratios, n=4)
    print(
        f"\nLightning     fit {statistics.median(ours):.0f} img/s, hand-written {statistics.median(theirs):.0f} img/s, "
        f"ratio {median:.3f} ({q1:.3f} to {q3:.3f}), at least {OF_PLAIN_LOOP} required"
    )
    return {
        "fit": statistics.median(ours),
        "by hand": statistics.median(theirs),
        "ratio": median,
        "q1": q1,
        "q3": q3,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="repvgg_a0")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS, metavar="LAYOUT:TYPE:MODE")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trial", nargs=2, metavar=("NAME", "SETTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.trial:
        print(json.dumps(trial(*arguments.trial, spec_of(arguments.model), arguments.size, arguments.batch)))
        return
    stamp = environment()
    print(f"{arguments.model}, {arguments.size}x{arguments.size}, batch {arguments.batch}: {stamp}\n{fused.status()}\n")
    sections: dict[str, Any] = {"environment": stamp}
    todo = {
        "speed": lambda: speed(arguments),
        "lightning": lambda: lightning_overhead(max(2, arguments.rounds // 4), arguments.threads),
    }
    for section in arguments.sections:
        sections[section] = todo[section]()
        if arguments.json:
            arguments.json.write_text(json.dumps(sections, indent=1))


if __name__ == "__main__":
    main()
