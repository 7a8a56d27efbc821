"""Time and peak memory to collapse RepVGG A0, B1 and B3, beside timm's ``reparameterize_model``, in one run.

    python benchmarks/collapse.py [--rounds 7] [--models a0 b1 b3]

Contenders: timm on its own model; repvgg on the same timm model; repvgg on its own model of the same row, these two
without proofs, as timm makes none; and once more with them, as is the default. Rounds alternate between them; times
are medians with quartiles, ratios are medians of the ratios within a round. Peak memory is what a fresh process that
does nothing else needs beyond the loaded model (Linux). Needs the extra ``timm``.
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

CONTENDERS = ("timm on timm", "repvgg on timm", "repvgg on repvgg", "repvgg on repvgg, proven")


def contender(kind: str, row: str) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    """A model of ``row`` and the function that collapses it into a new one."""
    proven = kind.endswith(", proven")
    collapser, _, owner = kind.removesuffix(", proven").split()
    if owner == "timm":
        import timm

        model: nn.Module = timm.create_model(f"repvgg_{row}")
    else:
        from repvgg import create_model

        model = create_model(f"repvgg_{row}")
    if collapser == "timm":
        from timm.utils.model import reparameterize_model

        return model.eval(), lambda m: reparameterize_model(m, inplace=False)
    from repvgg import reparameterize

    return model.eval(), lambda m: reparameterize(m, prove=proven)


def rotated(index: int) -> tuple[str, ...]:
    place = index % len(CONTENDERS)
    return CONTENDERS[place:] + CONTENDERS[:place]


def seconds(collapse: Callable[[nn.Module], object], model: nn.Module) -> float:
    gc.collect()
    start = time.perf_counter()
    outcome = collapse(model)
    elapsed = time.perf_counter() - start
    del outcome
    return elapsed


def peak_mebibytes(kind: str, row: str) -> float:
    """Run this file on one contender alone, and read the growth of the process's largest resident set."""
    command = [sys.executable, __file__, "--one", kind, row]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def one(kind: str, row: str) -> float:
    warm, collapse = contender(kind, "a0")
    collapse(warm)  # imports and first-call caches are no part of the collapse
    model, collapse = contender(kind, row)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which a new process takes over from its parent
    before = resident_mebibytes("VmRSS")
    outcome = collapse(model)
    peak = resident_mebibytes("VmHWM")
    del outcome
    return max(0.0, peak - before)


def resident_mebibytes(which: str) -> float:
    """The resident set of this process on Linux, now ("VmRSS") or at its largest ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=["a0", "b1", "b3"])
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'model':8}{'contender':26}{'seconds (quartiles)':28}{'ratio to timm':22}{'peak MiB':>9}")
    for row in arguments.models:
        contenders = {kind: contender(kind, row) for kind in CONTENDERS}
        times: dict[str, list[float]] = {kind: [] for kind in CONTENDERS}
        for index in range(arguments.rounds + 1):
            for kind in rotated(index):
                model, collapse = contenders[kind]
                elapsed = seconds(collapse, model)
                if index:  # the first round warms up
                    times[kind].append(elapsed)
        del contenders, model, collapse
        for kind in CONTENDERS:
            low, median, high = statistics.quantiles(times[kind], n=4)
            ratios = [a / b for a, b in zip(times[kind], times[CONTENDERS[0]], strict=True)]
            ratio_low, ratio, ratio_high = statistics.quantiles(ratios, n=4)
            print(
                f"{row:8}{kind:26}{f'{median:.3f} ({low:.3f}-{high:.3f})':28}"
                f"{f'{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})':22}{peak_mebibytes(kind, row):9.0f}"
            )


if __name__ == "__main__":
    main()
