from importlib import import_module

import torch

from repvgg.measure import IDENTITY, environment

module = import_module("repvgg.measure.settings")


def test_environment_has_text_entries():
    entries = environment()
    assert entries["torch"] == torch.__version__
    assert entries["threads"] == str(torch.get_num_threads())
    assert {"cpu", "cores", "instructions", "python", "platform"} <= entries.keys()
    assert all(isinstance(value, str) and value for value in entries.values())


def test_identity_entries_are_in_the_environment():
    on_a_gpu = {"gpu", "driver", "cuda", "cudnn"}
    assert set(IDENTITY) - on_a_gpu <= environment().keys()
    assert "load" not in IDENTITY


def test_governor_and_load_are_read_from_the_system(tmp_path, monkeypatch):
    (tmp_path / "governor").write_text("powersave\n")
    monkeypatch.setattr(module, "_GOVERNOR", tmp_path / "governor")
    monkeypatch.setattr(module.os, "getloadavg", lambda: (1.25, 9.0, 9.0))
    entries = environment()
    assert (entries["governor"], entries["load"]) == ("powersave", "1.25")


def test_unknown_entries_are_left_out(tmp_path, monkeypatch):
    def refuse():
        raise OSError

    monkeypatch.setattr(module, "_GOVERNOR", tmp_path / "missing")
    monkeypatch.setattr(module.os, "getloadavg", refuse)
    assert not {"governor", "load"} & environment().keys()


def test_gpu_is_named_if_cuda_is_initialized(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 1080 Ti")
    entries = environment()
    assert (entries["gpu"], entries["driver"]) == ("NVIDIA GeForce GTX 1080 Ti", "570.86.15")
