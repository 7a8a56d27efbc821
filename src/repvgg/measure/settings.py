"""The conditions of a measurement: device, dtype, memory format and threads; and the machine, as text."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from repvgg._contexts import num_threads, preserve_fp32_precision
from repvgg.errors import UsageError
from repvgg.measure.denormals import flushed_denormals
from repvgg.measure.timing import CudaEvents, Stopwatch, WallClock

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "tf32", "float16", "bfloat16"]

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_DRIVER = Path("/proc/driver/nvidia/version")

#: The entries that identify a machine; the others describe its state at the time.
IDENTITY = ("cpu", "instructions", "cores", "threads", "gpu", "driver", "cuda", "cudnn", "torch")


@dataclass(frozen=True)
class RunSettings:
    """Device, dtype, memory format and threads, shared by everything that is measured side by side.

    Attributes:
        device: cpu or cuda.
        dtype: of weights and images. tf32 keeps both in float32 and lets the GPU round the factors of matrix products
            to 10 mantissa bits; float32 does not allow that.
        channels_last: keep images and weights in NHWC.
        threads: CPU threads; default: PyTorch's.
        compile: run the model through torch.compile.
        flush_denormal: let the CPU treat denormal numbers, which are slow on some, as 0.

    Raises:
        UsageError: ``threads`` is below 1, or tf32 is requested on a CPU.
    """

    device: Device = "cpu"
    dtype: Dtype = "float32"
    channels_last: bool = False
    threads: int | None = None
    compile: bool = False
    flush_denormal: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.threads}.")
        if self.dtype == "tf32" and self.device == "cpu":
            raise UsageError("tf32 exists on NVIDIA GPUs only: use --device cuda, or another dtype.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of weights and images."""
        dtype: torch.dtype = getattr(torch, "float32" if self.dtype == "tf32" else self.dtype)
        return dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of 4-D weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the settings to PyTorch; restore them on exit.

        Raises:
            UsageError: the device does not exist, or denormals cannot be flushed.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("PyTorch finds no CUDA device here: use --device cpu.")
        with ExitStack() as stack:
            stack.enter_context(num_threads(self.threads))
            stack.enter_context(flushed_denormals(self.flush_denormal))
            if self.device == "cuda":
                torch.cuda.init()  # type: ignore[no-untyped-call]
                stack.enter_context(_gpu_precision(self.dtype == "tf32"))
            yield

    def place(self, model: nn.Module) -> nn.Module:
        """Move ``model`` in place to the device, dtype and memory format, in eval mode; compile it if requested."""
        model.eval().to(self.device, self.torch_dtype).to(memory_format=self.memory_format)
        if not self.compile:
            return model
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        return compiled

    def images(self, batch: int, shape: tuple[int, int, int]) -> Tensor:
        """Return random images (N, C, H, W), the same ones on every call."""
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        return images.to(self.device, self.torch_dtype, memory_format=self.memory_format)

    def stopwatch(self, batch: int) -> Stopwatch:
        """Return the clock of the device. A batch of one measures latency: each call waits for its result."""
        return CudaEvents(waits=batch == 1) if self.device == "cuda" else WallClock()


@contextmanager
def _gpu_precision(tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    with preserve_fp32_precision():
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            # benchmark: cuDNN tries its kernels during the warm-up and keeps the fastest for each shape.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def environment() -> dict[str, str]:
    """Describe the machine as PyTorch uses it: processor, instruction set, cores, threads, versions, governor, load.

    ``load`` is the load average of the last minute: call this before the measured work starts. The GPU, its driver,
    CUDA and cuDNN are named if CUDA is initialized; this function does not initialize it. Unknown entries are left out.
    """
    entries = {
        "cpu": processor_name(),
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


def processor_name() -> str:
    """Return the model name of the processor; "unknown" if the system does not tell."""
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
