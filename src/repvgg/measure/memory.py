"""What an allocator really held, moment by moment, and what there is to have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

from repvgg.measure.stopwatch import Call

_MEMORY_EVENT, _CPU = "[memory]", 0
_CHATTER = "KINETO_LOG_LEVEL"  # the profiler's library greets everybody on standard error
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_INFO = Path("/proc/meminfo")
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryStep:
    """One moment at which memory was taken or given back.

    Attributes:
        change: bytes, negative where given back.
        held: bytes since the beginning, this change included.
    """

    change: int
    held: int


def held_memory(call: Call) -> tuple[MemoryStep, ...]:
    """Every allocation of PyTorch's CPU allocator during one call, in ``torch.inference_mode``.

    Call it once before, so that what is allocated once and for all does not count. The highest ``held`` is the peak.

    Limits: memory that a library takes on its own, such as oneDNN's scratchpads, is not seen.
    """
    with torch.inference_mode(), _silent_profiler(), TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Ev Idx"], int(event["args"]["Bytes"]))
        for event in events
        if event.get("name") == _MEMORY_EVENT and event["args"]["Device Type"] == _CPU
    ]
    return _steps([change for _, _, change in sorted(changes)])


def _steps(changes: list[int]) -> tuple[MemoryStep, ...]:
    return tuple(MemoryStep(*step) for step in zip(changes, accumulate(changes), strict=True))


@contextmanager
def _silent_profiler() -> Iterator[None]:
    before = os.environ.get(_CHATTER)
    os.environ[_CHATTER] = "99"
    try:
        yield
    finally:
        os.environ.pop(_CHATTER)
        if before is not None:
            os.environ[_CHATTER] = before


def peak_of_gpu(call: Call) -> int:
    """Bytes that CUDA's allocator held at most during one call, beyond what it held before, in inference mode."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def available_memory(device: str) -> int | None:
    """Bytes that may still be taken on "cpu" or "cuda"; None where the system does not tell.

    On a CPU what Linux counts as available, or less where the process lives in a group with a limit.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    known = [number for number in (_available_in_machine(), _available_in_group()) if number is not None]
    return min(known, default=None)


def _available_in_machine() -> int | None:
    try:
        lines = _MEMORY_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None


def _available_in_group() -> int | None:
    """Of a control group, version 2: its limit less what it uses."""
    try:
        limit, used = ((_CGROUP / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no group, or no limit, which is written "max"
        return None


@contextmanager
def peak_watched(accelerator: str = "cpu") -> Iterator[Callable[[], int | None]]:
    """Gives what tells, inside and after, how many bytes were taken at most since it began.

    On a GPU what PyTorch's allocator held; on a CPU the resident memory of the whole process, which includes libraries
    and data, as Linux counts it; None where the system does not tell.

    Args:
        accelerator: "cpu" leaves a GPU that is there out of it.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    with suppress(OSError):
        _FORGET.write_text("5", encoding="ascii")  # the highest so far becomes what is resident now
    yield _highest_resident


def _highest_resident() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
