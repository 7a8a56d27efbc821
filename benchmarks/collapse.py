"""Time and peak memory to collapse RepVGG A0, B1 and B3, compared with timm's ``reparameterize_model``.

    python benchmarks/collapse.py [--rounds 7] [--models a0 b1 b3]

Variants: timm on its own model; repvgg on the same timm model; repvgg on its own model of the same architecture, these
two without proofs, because timm makes none; and the last one again with proofs, as is the default. Rounds alternate
between them; times are medians with quartiles, ratios are medians of the ratios within a round. Peak memory is what a
new process that does nothing else needs beyond the loaded model (Linux). Needs the extra ``timm``.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

VARIANTS = ("timm on timm", "repvgg on timm", "repvgg on repvgg", "repvgg on repvgg, proven")


def variant(kind: str, name: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """Return a model of the architecture ``name`` and the function that collapses it into a new one."""
    proven = kind.endswith(", proven")
    collapser, _, owner = kind.removesuffix(", proven").split()
    if owner == "timm":
        import timm

        model: nn.Module = timm.create_model(f"repvgg_{name}")
    else:
        from repvgg import create_model

        model = create_model(f"repvgg_{name}")
    if collapser == "timm":
        from timm.utils.model import reparameterize_model

        return model.eval(), lambda m: reparameterize_model(m, inplace=False)
    from repvgg import reparameterize

    return model.eval(), lambda m: reparameterize(m, prove=proven)


def rotated(index: int) -> tuple[str, ...]:
    place = index % len(VARIANTS)
    return VARIANTS[place:] + VARIANTS[:place]


def seconds(collapse: Callable[[nn.Module], object], model: nn.Module) -> float:
    gc.collect()
    start = time.perf_counter()
    result = collapse(model)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def peak_mebibytes(kind: str, name: str) -> float:
    """Return the growth of the peak resident set of a process that runs this file on one variant."""
    command = [sys.executable, __file__, "--one", kind, name]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def one(kind: str, name: str) -> float:
    warm, collapse = variant(kind, "a0")
    collapse(warm)  # imports and first-call caches are not part of the measurement
    model, collapse = variant(kind, name)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which a new process inherits from its parent
    before = resident_mebibytes("VmRSS")
    result = collapse(model)
    peak = resident_mebibytes("VmHWM")
    del result
    return max(0.0, peak - before)


def resident_mebibytes(which: str) -> float:
    """Return the resident set of this process on Linux: current ("VmRSS") or peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=["a0", "b1", "b3"])
    parser.add_argument("--one", nargs=2, metavar=("KIND", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'model':8}{'variant':26}{'seconds (quartiles)':28}{'ratio to timm':22}{'peak MiB':>9}")
    for name in arguments.models:
        variants = {kind: variant(kind, name) for kind in VARIANTS}
        times: dict[str, list[float]] = {kind: [] for kind in VARIANTS}
        for index in range(arguments.rounds + 1):
            for kind in rotated(index):
                model, collapse = variants[kind]
                elapsed = seconds(collapse, model)
                if index:  # the first round warms up
                    times[kind].append(elapsed)
        del variants, model, collapse
        for kind in VARIANTS:
            low, median, high = statistics.quantiles(times[kind], n=4)
            ratios = [a / b for a, b in zip(times[kind], times[VARIANTS[0]], strict=True)]
            ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4)
            print(
                f"{name:8}{kind:26}{f'{median:.3f} ({low:.3f}-{high:.3f})':28}"
                f"{f'{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})':22}{peak_mebibytes(kind, name):9.0f}"
            )


if __name__ == "__main__":
    main()
