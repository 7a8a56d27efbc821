"""The machine and the time of a measurement, as text."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_DRIVER = Path("/proc/driver/nvidia/version")

#: The entries that identify a machine; the others describe its state at the time.
IDENTITY = ("cpu", "instructions", "cores", "threads", "gpu", "driver", "cuda", "cudnn", "torch")


def environment() -> dict[str, str]:
    """Describe the machine as PyTorch uses it: processor, instruction set, cores, threads, versions, governor, load.

    ``load`` is the load average of the last minute: call this before the measured work starts. The GPU, its driver,
    CUDA and cuDNN are named if CUDA is initialized; this function does not initialize it. Unknown entries are left out.
    """
    entries = {
        "cpu": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count() or "unknown"),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "governor": _read(_GOVERNOR).strip(),
        "load": _load(),
        **(_gpu() if torch.cuda.is_initialized() else {}),  # type: ignore[no-untyped-call]
    }
    return {name: value for name, value in entries.items() if value}


def _processor() -> str:
    # platform.processor() is empty on many Linux systems: prefer the model name of /proc/cpuinfo.
    names = [line.split(":", 1)[1].strip() for line in _read(_CPUINFO).splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def _load() -> str:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError):  # missing on Windows, refused in some containers
        return ""


def _gpu() -> dict[str, str]:
    version = re.search(r"\b\d{3,}\.\d[\d.]*", _read(_DRIVER))  # such as 570.86.15
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": version.group() if version else "",
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),  # type: ignore[no-untyped-call]
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
