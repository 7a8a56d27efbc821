"""Processes, batch plans and synchronized batch norm; two processes (gloo, CPU) are compared with a single one.

Fast tests fork both processes with the environment that torchrun gives them; slow ones start torchrun itself.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from repvgg.errors import UsageError
from repvgg.training import (
    BatchPlan,
    OptimConfig,
    SyncBatchNorm,
    TrainConfig,
    plan_batches,
    process_layout,
    write_config,
)
from repvgg.training.distributed import synchronized_batch_norm
from tests.training.ddp_script import norms, observed_fit, step
from tests.training.helpers import CONFIG, outcome, tiny

SCRIPT = Path(__file__).with_name("ddp_script.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
TWO = replace(CONFIG, epochs=2, batch_size=16, device_batch=4, ema=0.9, sync_bn=True, dry_run=True)
SMALL = st.integers(1, 32)


@given(images=SMALL, accumulation=SMALL, devices=SMALL, lr=st.floats(1e-4, 10), lr_batch=st.integers(1, 4096))
def test_a_plan_multiplies_to_the_global_batch(images, accumulation, devices, lr, lr_batch):
    batch = images * accumulation * devices
    if batch < 2:
        return
    config = TrainConfig(batch_size=batch, device_batch=images, optim=OptimConfig(lr=lr, lr_batch=lr_batch))
    plan = plan_batches(config, devices)
    assert (plan.device_batch, plan.accumulation, plan.world_size) == (images, accumulation, devices)
    assert plan.global_batch == batch
    assert plan.lr == pytest.approx(lr * batch / lr_batch)
    assert plan_batches(replace(config, optim=replace(config.optim, lr_batch=None)), devices).lr == lr


@given(batch=st.integers(2, 512), devices=st.integers(1, 8), images=st.none() | st.integers(1, 600))
def test_the_global_batch_is_exact_or_rejected(batch, devices, images):
    config = TrainConfig(batch_size=batch, device_batch=images)
    try:
        plan = plan_batches(config, devices)
    except UsageError:
        assert batch % devices or (batch // devices) % min(images, batch // devices)
    else:
        assert plan.global_batch == batch
        assert plan.device_batch <= (images or batch)


def test_rejected_plans_name_the_remedy():
    with pytest.raises(
        UsageError, match=r"batch of 16 does not divide evenly over 3 devices: choose another batch_size\.$"
    ):
        plan_batches(CONFIG, 3)
    with pytest.raises(
        UsageError, match=r"16 images of each device are not a multiple of 5 at a time: choose a device_batch that"
    ):
        plan_batches(replace(CONFIG, device_batch=5))


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (BatchPlan(64, 1, 1, 0.1, 1.0), "global batch 64 (one device), learning rate 0.1"),
        (BatchPlan(8, 4, 1, 0.1, 1.0), "global batch 32 (8 at a time, accumulated 4 times), learning rate 0.1"),
        (
            BatchPlan(32, 1, 8, 0.1, 1.0),
            "global batch 256 (32 on each of 8 devices), learning rate 0.1",
        ),
        (
            BatchPlan(32, 2, 8, 0.2, 2.0),
            "global batch 512 (32 on each of 8 devices, accumulated 2 times), learning rate 0.2, scaled by 2 with the "
            "batch",
        ),
    ],
)
def test_plan_as_text(plan, text):
    assert str(plan) == text


@pytest.mark.parametrize("config", [TrainConfig(devices=2), TrainConfig(nodes=2)])
def test_several_devices_without_torchrun(config):
    with pytest.raises(UsageError, match=r"torchrun --nproc-per-node DEVICES -m repvgg train\.$"):
        process_layout(config)


def test_layout_under_torchrun(monkeypatch):
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    layout = process_layout(TrainConfig(devices=4))
    assert (layout.rank, layout.devices, layout.nodes, layout.world_size) == (5, 4, 2, 8)
    with pytest.raises(UsageError, match="4 devices were started, but the config asks for 3: leave devices out"):
        process_layout(TrainConfig(devices=3))
    with pytest.raises(UsageError, match="2 nodes were started"):
        process_layout(TrainConfig(nodes=1))


@pytest.fixture(scope="module")
def two_ranks(server, tmp_path_factory):
    """What each of two ranks computed."""
    out = tmp_path_factory.mktemp("ranks") / "found"
    code, text = server.ranks(2, out)
    assert code == 0, text
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(2)]


def test_two_ranks_follow_a_single_process(two_ranks):
    single, (first, second) = observed_fit(), (rank["fit"] for rank in two_ranks)
    assert len(single["losses"]) == 50
    assert single["losses"][-5:].mean() < 0.6 * single["losses"][:5].mean()
    assert_close(first["losses"], single["losses"], rtol=0, atol=1e-4)
    assert_close(first["weights"], single["weights"], rtol=1e-3, atol=1e-4)
    assert_close(first["history"], single["history"], rtol=0, atol=1e-4)
    assert_close(second, first, rtol=0, atol=0)


def test_synchronized_norms_use_the_global_batch(two_ranks):
    net, x, target = norms()
    expected = step(net, x, target)
    for rank, images in enumerate((slice(0, 2), slice(2, 6))):
        found = two_ranks[rank]["norms"]
        assert_close(found["out"], expected["out"][images])
        assert_close(found["input"], expected["input"][images] * 2)
        assert_close(found["gradients"], expected["gradients"])
        assert_close(found["buffers"], expected["buffers"])


def test_a_confusion_matrix_is_summed_over_ranks(two_ranks):
    """Rank 0 has pixels (true 0, predicted 0) and (0, 1), rank 1 has (0, 1) and an ignored one."""
    for found in two_ranks:
        assert found["confusion"].tolist() == [[1, 2], [0, 0]]


def test_norms_are_restored():
    model = tiny()
    model.extra = nn.ModuleList([model.stem.conv.dense.bn, nn.SyncBatchNorm(3)])  # a shared norm, and a user's own
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
def test_a_single_process_computes_plain_batch_norm(training):
    net, x, target = norms()
    plain, _, _ = norms()
    for one in (net, plain):
        one.train(training)
    with synchronized_batch_norm(net):
        found = step(net, x, target)
    assert_close(found, step(plain, x, target), rtol=0, atol=0)


def torchrun(*arguments, timeout=120):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)


def run_two(folder, event="none", config=TWO, timeout=120):
    folder.parent.mkdir(exist_ok=True)
    file = write_config(folder.parent / "wanted.yaml", config, overwrite=True)
    return torchrun(SCRIPT, event, "train", "--config", file, "--out", folder, "--resume", timeout=timeout)


@pytest.mark.slow
def test_command_line_under_torchrun(tmp_path):
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
@pytest.mark.parametrize(("event", "message"), [("raise", "RuntimeError: this rank failed"), ("exit", "exitcode  : 7")])
def test_a_rank_that_dies_ends_the_run(tmp_path, event, message):
    done = run_two(tmp_path / "run", event)
    end = time.time()
    assert done.returncode != 0
    assert message in done.stderr
    assert end - float(re.search(r"fails at (\S+)", done.stderr)[1]) < 60


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_first(tmp_path):
    done = run_two(tmp_path / "run", "terminate")
    assert done.returncode != 0
    assert "repvgg train --config" in done.stderr
    for folder in (tmp_path / "run", tmp_path / "whole" / "run"):
        done = run_two(folder)
        assert done.returncode == 0, done.stderr
    assert_close_outcomes(outcome(tmp_path / "run"), outcome(tmp_path / "whole" / "run"))


def assert_close_outcomes(found, expected):
    """Weights agree bit for bit; the losses of two ranks are summed in another order if the run was interrupted."""
    for name in ("train.safetensors", "plain.safetensors", "best.safetensors", "current_model_state"):
        assert_close(found[name], expected[name], rtol=0, atol=0)
    assert [record["loss"] for record in found["history"]] == pytest.approx(
        [record["loss"] for record in expected["history"]], rel=1e-6
    )
