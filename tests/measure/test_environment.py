from importlib import import_module

import torch

from repvgg.measure import IDENTITY, environment

module = import_module("repvgg.measure.environment")


def test_the_environment_is_a_stamp_of_words():
    stamp = environment()
    assert stamp["torch"] == torch.__version__
    assert stamp["threads"] == str(torch.get_num_threads())
    assert {"cpu", "cores", "instructions", "python", "platform"} <= stamp.keys()
    assert all(isinstance(value, str) and value for value in stamp.values())


def test_what_a_machine_is_told_apart_by_is_in_the_stamp():
    on_a_gpu = {"gpu", "driver", "cuda", "cudnn"}
    assert set(IDENTITY) - on_a_gpu <= environment().keys()
    assert "load" not in IDENTITY


def test_governor_and_load_are_read_where_the_system_tells_them(tmp_path, monkeypatch):
    (tmp_path / "governor").write_text("powersave\n")
    monkeypatch.setattr(module, "_GOVERNOR", tmp_path / "governor")
    monkeypatch.setattr(module.os, "getloadavg", lambda: (1.25, 9.0, 9.0))
    stamp = environment()
    assert (stamp["governor"], stamp["load"]) == ("powersave", "1.25")


def test_what_the_system_does_not_tell_is_left_out(tmp_path, monkeypatch):
    def refuse():
        raise OSError

    monkeypatch.setattr(module, "_GOVERNOR", tmp_path / "missing")
    monkeypatch.setattr(module.os, "getloadavg", refuse)
    assert not {"governor", "load"} & environment().keys()


def test_the_gpu_is_named_where_cuda_is_in_use(tmp_path, monkeypatch):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce GTX 1080 Ti")
    stamp = environment()
    assert (stamp["gpu"], stamp["driver"]) == ("NVIDIA GeForce GTX 1080 Ti", "570.86.15")
