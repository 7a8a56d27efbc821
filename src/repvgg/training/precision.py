"""Where a run computes, and the precision in which that is fast."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from repvgg.training.config import Precision, TrainConfig

_BF16_FLAGS = ("amx_bf16", "avx512_bf16")  # x86 instructions that multiply bfloat16 numbers
_BF16_CAPABILITY = (8, 0)  # CUDA: Ampere
_FP16_CAPABILITY = (7, 0)  # CUDA: Volta, the first with tensor cores
# oneDNN's variable that forbids instructions, and the values that leave those for bfloat16.
_ISA_LIMIT, _ISAS_WITH_BF16 = "ONEDNN_MAX_CPU_ISA", ("BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")


class ChosenPrecision(NamedTuple):
    """A precision, and why this machine is fast at it, as a clause."""

    precision: Precision
    reason: str


def runs_on_cpu(config: TrainConfig) -> bool:
    """Return whether a run with ``config`` computes on the CPU of this machine."""
    return config.accelerator == "cpu" or not torch.accelerator.is_available()


def fastest_precision(*, on_cpu: bool) -> ChosenPrecision:
    """Return the precision in which this machine trains fastest, by the instructions that it has.

    A CPU without instructions for bfloat16 converts each operand to float32 and back: training the recipe ``cifar``
    took 5.5 times as long in bf16 as in float32 on a Zen 3.
    """
    if on_cpu:
        return _of_cpu()
    if not torch.cuda.is_available():
        return ChosenPrecision("float32", "the accelerator is no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    device = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    if (major, minor) >= _BF16_CAPABILITY:
        return ChosenPrecision("bf16", f"{device} multiplies bfloat16 numbers")
    if (major, minor) >= _FP16_CAPABILITY:
        return ChosenPrecision("fp16", f"{device} multiplies float16 numbers, not bfloat16")
    return ChosenPrecision("float32", f"{device} has no tensor cores")


def settle_precision(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Return ``config`` with the precision that ``auto`` stands for on this machine, and a line for the user."""
    if config.precision != "auto":
        return config, ()
    precision, reason = fastest_precision(on_cpu=runs_on_cpu(config))
    return replace(config, precision=precision), (f"precision {precision}, chosen for this machine: {reason}",)


def _of_cpu() -> ChosenPrecision:
    flags = _cpu_flags()
    found = next((flag for flag in _BF16_FLAGS if flag in flags), None)
    if found is None and platform.machine().lower() in ("arm64", "aarch64") and "bf16" in flags:
        found = "bf16"
    if found is None:
        return ChosenPrecision("float32", "this CPU has no instructions for bfloat16")
    limit = os.environ.get(_ISA_LIMIT, "").upper()
    if limit and not any(word in limit for word in _ISAS_WITH_BF16):
        return ChosenPrecision("float32", f"{_ISA_LIMIT}={limit} forbids the instructions for bfloat16")
    return ChosenPrecision("bf16", f"this CPU has instructions for bfloat16 ({found})")


def _cpu_flags() -> frozenset[str]:
    """Return the instruction sets that Linux lists; none on other systems, whose CPUs count as without bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on ARM.
    listed = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(listed, "").split())
