"""Memory: live activations of a run, allocations of PyTorch's allocators, peaks, and free memory of the system."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

_PROFILER_LOG_LEVEL = "KINETO_LOG_LEVEL"
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class LiveStorageTracker:
    """Track the live storages of a run without keeping any of them alive.

    A storage is live from the op that creates it until its last reference goes, as an allocator sees it; a view keeps
    the whole storage. The parameters and buffers of the model are excluded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._excluded = {_storage_id(tensor) for tensor in _strided_state(model)}

    def live_bytes(self, new: Iterable[Tensor]) -> int:
        """Add the storages of ``new``, drop the dead ones, and return the bytes that are live now.

        Tensors without a storage (sparse ones) count nothing.
        """
        for tensor in new:
            if tensor.layout is torch.strided and (key := _storage_id(tensor)) not in self._excluded:
                storage = tensor.untyped_storage()
                # If the address of a dead storage is reused, its entry is overwritten.
                self._live[key] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        dead = [key for key, (reference, _) in self._live.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in dead:
            del self._live[key]
        return sum(size for _, size in self._live.values())


def weight_bytes(model: nn.Module) -> int:
    """Return the memory of the parameters and buffers of a model; a shared storage counts once."""
    return sum({_storage_id(t): t.untyped_storage().nbytes() for t in _strided_state(model)}.values())


def _strided_state(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.layout is torch.strided]


def _storage_id(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@dataclass(frozen=True)
class MemoryStep:
    """One allocation or release."""

    change: int  # bytes; negative for a release
    held: int  # bytes allocated since the start, this change included


def held_memory(call: Callable[[], object]) -> tuple[MemoryStep, ...]:
    """Return every allocation and release of PyTorch's CPU allocator during one call, in ``torch.inference_mode``.

    Run ``call`` once before, so that one-time allocations do not count. The highest ``held`` is the peak.

    Limits: memory that a library allocates by itself, such as oneDNN's scratchpads, is not seen.
    """
    with torch.inference_mode(), _quiet_profiler(), TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    cpu = 0  # c10::DeviceType::CPU
    allocations = [
        (event["ts"], event["args"]["Ev Idx"], int(event["args"]["Bytes"]))
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == cpu
    ]
    changes = [change for _, _, change in sorted(allocations)]  # several events may share a time stamp: then by index
    return tuple(MemoryStep(*step) for step in zip(changes, accumulate(changes), strict=True))


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    # Kineto logs its start to standard error at every level below 99.
    before = os.environ.get(_PROFILER_LOG_LEVEL)
    os.environ[_PROFILER_LOG_LEVEL] = "99"
    try:
        yield
    finally:
        os.environ.pop(_PROFILER_LOG_LEVEL)
        if before is not None:
            os.environ[_PROFILER_LOG_LEVEL] = before


def gpu_peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of CUDA's allocator during one call, above what was allocated before, in inference mode."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def available_memory(device: str) -> int | None:
    """Return the free bytes of "cpu" or "cuda"; None if the system does not report them.

    For the CPU that is Linux's MemAvailable, or less if the process lives in a control group with a limit.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    known = [number for number in (_available_in_system(), _available_in_cgroup()) if number is not None]
    return min(known, default=None)


def _available_in_system() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None  # in kB


def _available_in_cgroup() -> int | None:
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no control group (version 2), or no limit, which is written "max"
        return None


@contextmanager
def track_peak_memory(accelerator: str = "cpu") -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the peak memory in bytes since entry; it also works after exit.

    On a GPU it is the peak of PyTorch's allocator; on a CPU the peak resident memory of the whole process (libraries
    and data included) as Linux reports it, or None on other systems.

    Args:
        accelerator: "cpu" ignores a GPU.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    with suppress(OSError):
        _CLEAR_REFS.write_text("5", encoding="ascii")  # resets VmHWM to the current resident size; see proc(5)
    yield _peak_resident_bytes


def _peak_resident_bytes() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
