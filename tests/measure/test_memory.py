import os

import torch

from repvgg.measure import held_memory, memory


def test_held_memory_by_hand():
    """Two tensors together, then one: 4 MB, 8 MB, 4 MB, 0."""

    def call() -> None:
        a = torch.zeros(1_000_000)
        b = a + a
        del a
        del b

    call()
    sizes = [(step.change, step.held) for step in held_memory(call) if abs(step.change) > 1000]
    assert sizes == [(4_000_000, 4_000_000), (4_000_000, 8_000_000), (-4_000_000, 4_000_000), (-4_000_000, 0)]


def test_profiler_logs_nothing(capfd, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "3")
    held_memory(lambda: torch.zeros(3))
    assert capfd.readouterr().err == ""
    assert os.environ["KINETO_LOG_LEVEL"] == "3"


def test_available_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    assert memory.available_memory("cpu") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    6000 kB\n")
    assert memory.available_memory("cpu") == 6000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory("cpu") == 6000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.available_memory("cpu") == 4000


def test_peak_is_reset_by_each_context(tmp_path, monkeypatch):
    with memory.track_peak_memory() as peak:
        before = peak()
        held = torch.zeros(40_000_000)
        del held
    with memory.track_peak_memory() as again:
        after = again()
    if before is not None and after is not None:  # Linux
        assert peak() is not None
        assert after - before < 100_000_000, "the peak was reset"
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "none")
    with memory.track_peak_memory() as peak:
        assert peak() is None


def test_peak_resident_memory_is_read_from_proc(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("Name: x\nVmHWM:\t    1234 kB\nVmRSS: 1000 kB\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "clear")
    with memory.track_peak_memory() as peak:
        assert peak() == 1234 * 1024
    assert (tmp_path / "clear").read_text() == "5"
