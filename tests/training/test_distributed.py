"""Two processes on the CPU (gloo), started by torchrun, beside one with the same global batch."""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.errors import UsageError
from repvgg.training import SyncBatchNorm, TrainConfig, process_layout, write_config
from repvgg.training.distributed import synchronized_batch_norm
from tests.training.ddp_script import norms, step, watched_fit
from tests.training.helpers import CONFIG, outcome, tiny

SCRIPT = Path(__file__).with_name("ddp_script.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
TWO = replace(CONFIG, epochs=2, batch_size=16, device_batch=4, ema=0.9, sync_bn=True, dry_run=True)


def torchrun(*arguments, timeout=120):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What both processes found."""
    out = tmp_path_factory.mktemp("together") / "found"
    done = torchrun(SCRIPT, "both", out)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]


def test_follows_one_process(together):
    alone, (first, second) = watched_fit(), (one["fit"] for one in together)
    assert len(alone["losses"]) == 50
    assert alone["losses"][-5:].mean() < 0.6 * alone["losses"][:5].mean()
    assert_close(first["losses"], alone["losses"], rtol=0, atol=1e-4)
    assert_close(first["weights"], alone["weights"], rtol=1e-3, atol=1e-4)
    assert_close(first["history"], alone["history"], rtol=0, atol=1e-4)
    assert_close(second, first, rtol=0, atol=0)


def test_synchronized_norms_take_the_global_batch(together):
    net, x, target = norms()
    expected = step(net, x, target)
    for rank, share in enumerate((slice(0, 2), slice(2, 6))):
        found = together[rank]["norms"]
        assert_close(found["out"], expected["out"][share])
        assert_close(found["input"], expected["input"][share] * 2)
        assert_close(found["gradients"], expected["gradients"])
        assert_close(found["buffers"], expected["buffers"])


def test_norms_come_back_as_they_were():
    model = tiny()
    model.extra = nn.ModuleList([model.stem.conv.dense.bn, nn.SyncBatchNorm(3)])  # a second name, and one of a user
    before = {name: (module, type(module)) for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    with synchronized_batch_norm(model):
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
        assert kinds == {SyncBatchNorm, nn.SyncBatchNorm}
        assert model.extra[0] is model.stem.conv.dense.bn
        assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == tensors
        model.double()
        model.eval()
    after = {name: (module, type(module)) for name, module in model.named_modules(remove_duplicate=False)}
    assert after == before
    assert not any(module.training for module in model.modules())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("training", [True, False])
def test_one_process_is_plain_batch_norm(training):
    net, x, target = norms()
    plain, _, _ = norms()
    for one in (net, plain):
        one.train(training)
    with synchronized_batch_norm(net):
        found = step(net, x, target)
    assert_close(found, step(plain, x, target), rtol=0, atol=0)


@pytest.mark.parametrize("config", [TrainConfig(devices=2), TrainConfig(nodes=2)])
def test_nobody_started_several(config):
    with pytest.raises(UsageError, match=r"torchrun --nproc-per-node DEVICES -m repvgg train\.$"):
        process_layout(config)


def environment(patch, **variables):
    for name, value in variables.items():
        patch.setenv(name, str(value))


def test_layout_under_torchrun(monkeypatch):
    environment(monkeypatch, TORCHELASTIC_RUN_ID="x", RANK=5, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4)
    layout = process_layout(TrainConfig(devices=4))
    assert (layout.rank, layout.devices, layout.nodes, layout.world_size) == (5, 4, 2, 8)
    with pytest.raises(UsageError, match="4 devices were started, but the config asks for 3: leave devices out"):
        process_layout(TrainConfig(devices=3))
    with pytest.raises(UsageError, match="2 nodes were started"):
        process_layout(TrainConfig(nodes=1))


def run_two(folder, event="none", config=TWO, timeout=120):
    folder.parent.mkdir(exist_ok=True)
    file = write_config(folder.parent / "wanted.yaml", config, overwrite=True)
    arguments = ("train", "--config", file, "--out", folder, "--resume")
    return torchrun(SCRIPT, "command", event, *arguments, timeout=timeout)


@pytest.mark.slow
def test_a_run_of_the_command_line(tmp_path):
    file = write_config(tmp_path / "wanted.yaml", TWO)
    done = torchrun("-m", "repvgg", "train", "--config", file, "--out", tmp_path / "run", "--sync-bn")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("global batch 16 (4 on each of 2 devices, accumulated 2 times)") == 1
    assert done.stdout.count("wrote ") == 1
    files = {"config.yaml", "last.ckpt", "train.safetensors", "plain.safetensors", "best.safetensors", "report.json"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files | {"log.csv", "curve.png", "tensorboard"}
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 3
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("event", "said"), [("raise", "RuntimeError: this worker fell"), ("exit", "exitcode  : 7")])
def test_a_worker_that_dies_ends_the_run(tmp_path, event, said):
    done = run_two(tmp_path / "run", event)
    end = time.time()
    assert done.returncode != 0
    assert said in done.stderr
    assert end - float(re.search(r"falls at (\S+)", done.stderr)[1]) < 60


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_first(tmp_path):
    done = run_two(tmp_path / "run", "terminate")
    assert done.returncode != 0
    assert "go on with: repvgg train" in done.stderr
    for folder in (tmp_path / "run", tmp_path / "whole" / "run"):
        done = run_two(folder)
        assert done.returncode == 0, done.stderr
    assert_close_outcomes(outcome(tmp_path / "run"), outcome(tmp_path / "whole" / "run"))


def assert_close_outcomes(found, expected):
    """Two processes share the losses of a step, in another order where a run was cut."""
    for name in ("train.safetensors", "plain.safetensors", "best.safetensors", "current_model_state"):
        assert_close(found[name], expected[name], rtol=0, atol=0)
    assert [record["loss"] for record in found["history"]] == pytest.approx(
        [record["loss"] for record in expected["history"]], rel=1e-6
    )
