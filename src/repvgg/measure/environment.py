"""Where and when a measurement was made, in words."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_DRIVER = Path("/proc/driver/nvidia/version")

#: What makes two machines different; the rest of a stamp tells how the machine was at that time.
IDENTITY = ("cpu", "instructions", "cores", "threads", "gpu", "driver", "cuda", "cudnn", "torch")


def environment() -> dict[str, str]:
    """The machine as PyTorch uses it: processor, instruction set, cores, threads, versions, governor, load.

    ``load`` is the load average of the last minute: take the stamp before the work that is measured. The GPU, its
    driver, CUDA and cuDNN are named where CUDA is in use; asking does not start it. What cannot be read is left out.
    """
    stamp = {
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
    return {name: value for name, value in stamp.items() if value}


def _processor() -> str:
    """The model name of the processor, from Linux's /proc/cpuinfo where there is one."""
    names = [line.split(":", 1)[1].strip() for line in _read(_CPU_INFO).splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def _load() -> str:
    """Runnable processes on average over the last minute, where the system counts them."""
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError):  # no such call on Windows, no answer in some containers
        return ""


def _gpu() -> dict[str, str]:
    version = re.search(r"\b\d{3,}\.\d[\d.]*", _read(_DRIVER))
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
