"""Device, dtype, memory format and threads of a run that is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from repvgg._contexts import num_threads, preserve_fp32_precision
from repvgg.errors import UsageError
from repvgg.measure.denormals import flushed_denormals
from repvgg.measure.timing import CudaEvents, Stopwatch, WallClock

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "tf32", "float16", "bfloat16"]


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
