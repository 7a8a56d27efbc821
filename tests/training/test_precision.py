"""The precision "auto": what this machine is fast at."""

from dataclasses import replace
from pathlib import Path

import pytest

from repvgg.data import DataConfig, open_data
from repvgg.errors import UsageError
from repvgg.models import create_model
from repvgg.training import fit, precision, read_config, recipe_of, run, settle_precision

ON_CPU = replace(recipe_of("quickstart"), precision="auto")


def machine(monkeypatch, cpuinfo, arch="x86_64", limit=None):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: arch)
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)


@pytest.mark.parametrize(
    ("cpuinfo", "arch", "limit", "chosen", "reason"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "x86_64", None, "bf16", "avx512_bf16"),
        ("flags\t\t: fpu avx2 avx512_bf16 amx_bf16\n", "x86_64", "AVX512_CORE_AMX", "bf16", "amx_bf16"),
        ("flags\t\t: fpu avx2 avx512_bf16\n", "x86_64", "AVX2", "float32", "ONEDNN_MAX_CPU_ISA=AVX2"),
        ("flags\t\t: fpu avx2 avx512f\n", "x86_64", None, "float32", "no instructions for bfloat16"),
        ("flags\t\t: fpu avx2\n", "x86_64", None, "float32", "no instructions for bfloat16"),
        ("Features\t: fp asimd bf16\n", "aarch64", None, "bf16", "bf16"),
        ("Features\t: fp asimd\n", "aarch64", None, "float32", "no instructions for bfloat16"),
        ("", "x86_64", None, "float32", "no instructions for bfloat16"),
    ],
)
def test_cpus(monkeypatch, cpuinfo, arch, limit, chosen, reason):
    machine(monkeypatch, cpuinfo, arch, limit)
    found = precision.fastest_precision(on_cpu=True)
    assert found.precision == chosen
    assert reason in found.reason


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "float32")],
)
def test_gpus(monkeypatch, capability, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    found = precision.fastest_precision(on_cpu=False)
    assert (found.precision, "a card" in found.reason) == (chosen, True)


def test_an_explicit_precision_is_kept():
    for wanted in ("float32", "bf16"):
        config = replace(ON_CPU, precision=wanted)
        assert settle_precision(config) == (config, ())


def test_the_cifar_recipe_takes_what_the_machine_is_fast_at():
    assert recipe_of("cifar").precision == "auto"


def test_fit_says_what_it_takes(monkeypatch, capsys):
    machine(monkeypatch, "flags: avx2")
    config = replace(ON_CPU, epochs=1, batch_size=10, optim=replace(ON_CPU.optim, warmup_epochs=0))
    data = open_data(DataConfig(uri="fake:20x2", train_size=8))
    result = fit(create_model("repvgg_t0", num_classes=2), data, config)
    assert result.config.precision == "float32"
    assert "precision float32, chosen for this machine: this CPU has no instructions" in capsys.readouterr().out


def test_a_run_records_its_precision_and_resumes_in_it(monkeypatch, capsys, tmp_path):
    config = replace(
        ON_CPU,
        epochs=1,
        batch_size=10,
        data=DataConfig(uri="fake:20x2", train_size=8),
        optim=replace(ON_CPU.optim, warmup_epochs=0),
        dry_run=False,
    )
    chosen = precision.ChosenPrecision
    monkeypatch.setattr(precision, "fastest_precision", lambda on_cpu: chosen("float32", "it is old"))
    run(config, tmp_path / "run")
    assert "  precision float32, chosen for this machine: it is old" in capsys.readouterr().out.splitlines()
    assert read_config(tmp_path / "run" / "config.yaml").precision == "float32"
    monkeypatch.setattr(precision, "fastest_precision", lambda on_cpu: chosen("bf16", "it is new"))
    again = run(config, tmp_path / "run", resume=True)
    assert again.fit.config.precision == "float32"
    with pytest.raises(UsageError, match="has precision 'float32', not 'bf16'"):
        run(replace(config, precision="bf16"), tmp_path / "run", resume=True)
