"""Where, and in which numbers, a network runs while it is measured."""

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
from repvgg.measure.stopwatch import CudaEvents, Stopwatch, WallClock

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "tf32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Setting:
    """Device, numbers, layout and threads, for all that is measured side by side.

    Attributes:
        device: cpu or cuda.
        dtype: of weights and images. tf32 keeps both in float32 and lets the GPU round the factors of products to 10
            bits; float32 does not let it.
        channels_last: keep images and weights in NHWC.
        threads: CPU threads; without it what PyTorch takes.
        compile: run the model through torch.compile.
        flush_denormal: have the CPU take denormal numbers, which slow some down, for 0.

    Raises:
        UsageError: no such thread, no CUDA, or TF32 on a CPU.
    """

    device: Device = "cpu"
    dtype: Dtype = "float32"
    channels_last: bool = False
    threads: int | None = None
    compile: bool = False
    flush_denormal: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"Measuring needs threads of at least 1, not {self.threads}.")
        if self.dtype == "tf32" and self.device == "cpu":
            raise UsageError("tf32 is a way of NVIDIA GPUs to multiply: take --device cuda, or another dtype.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and images."""
        dtype: torch.dtype = getattr(torch, "float32" if self.dtype == "tf32" else self.dtype)
        return dtype

    @property
    def layout(self) -> torch.memory_format:
        """Of weights and images with four axes."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def applied(self) -> Iterator[None]:
        """PyTorch as this setting says; afterwards as before.

        Raises:
            UsageError: there is no such device, or denormals cannot be flushed.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("PyTorch sees no CUDA device here: take --device cpu.")
        with ExitStack() as stack:
            stack.enter_context(num_threads(self.threads))
            stack.enter_context(flushed_denormals(self.flush_denormal))
            if self.device == "cuda":
                torch.cuda.init()  # type: ignore[no-untyped-call]
                stack.enter_context(_products(self.dtype == "tf32"))
            yield

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model of nobody else's where the setting says, in eval mode, and compile it if it says so."""
        model.eval().to(self.device, self.torch_dtype).to(memory_format=self.layout)
        if not self.compile:
            return model
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        return compiled

    def images(self, batch: int, shape: tuple[int, int, int]) -> Tensor:
        """Random images (N, C, H, W), the same ones each time."""
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        return images.to(self.device, self.torch_dtype, memory_format=self.layout)

    def stopwatch(self, batch: int) -> Stopwatch:
        """The clock of the device. One image at a time is latency: each call waits for its answer."""
        return CudaEvents(waits=batch == 1) if self.device == "cuda" else WallClock()


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """TF32 in products of float32 on a GPU, or not; and have cuDNN try its kernels in the warm-up and keep the best."""
    before = torch.get_float32_matmul_precision()
    with preserve_fp32_precision():
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
                yield
        finally:
            torch.set_float32_matmul_precision(before)
