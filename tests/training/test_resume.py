"""A run that is killed at any moment and resumed ends with the same bits as an uninterrupted one."""

import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from repvgg.data import Augment
from repvgg.training import write_config
from repvgg.training.checkpoint import read_position
from tests.training.helpers import CONFIG, DATA, outcome, with_workers

KILL, TERM, INT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
EVERYTHING = replace(
    CONFIG,
    batch_size=24,
    device_batch=8,
    data=replace(DATA, augment=Augment(flip=0.5, alternate_flip=True)),
    progressive=((0.5, 0.75),),
    ema=0.9,
    mixup=0.3,
    save_steps=1,
    epochs=3,
)
STEPS = 12  # batches of an epoch of EVERYTHING: 4 steps of 3 rounds


def configured(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder / "wanted.yaml", config, overwrite=True)


def start(server, folder, config, stop=None):
    """Start a run, or resume it."""
    file = configured(folder.parent, config)
    return server("train", "--config", file, "--out", folder, "--resume", stop=stop)


def uninterrupted(server, folder, config):
    code, text = start(server, folder, config)
    assert code == 0, text
    return flat(outcome(folder))


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture(scope="module")
def expected(server, reference_folder):
    return uninterrupted(server, reference_folder, EVERYTHING)


def assert_same(folder, expected):
    found = flat(outcome(folder))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert found[name] == value, name


def flat(value, name=""):
    """Flatten nested containers: path → leaf."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf: one for key, part in items for leaf, one in flat(part, f"{name}/{key}").items()}


# Where a run is killed, one process after the other; each resumes from the checkpoint of the one before.
SERIES = {
    "within epochs": [("step", 5), ("half a file", 2), ("validation", 2)],
    "at their ends": [("checkpoint saved", 4), ("epoch written", 2), ("end", 1)],
}


@pytest.mark.parametrize("series", SERIES)
def test_killed_run_resumes(server, expected, tmp_path, series):
    for event, count in SERIES[series]:
        code, text = start(server, tmp_path / "run", EVERYTHING, (event, count, KILL))
        assert code == -KILL, text
    code, text = start(server, tmp_path / "run", EVERYTHING)
    assert code == 0, text
    assert_same(tmp_path / "run", expected)
    assert not list((tmp_path / "run").glob(".repvgg-*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_run_killed_repeatedly_at_random_steps_resumes(server, tmp_path, seed, workers):
    """Each seed draws an accumulation, memory format, optimizer and save interval; its own uninterrupted run is the
    reference."""
    draw = random.Random(f"{seed} {workers}")
    config = replace(
        with_workers(EVERYTHING, workers),
        device_batch=draw.choice([None, 8, 12]),
        ema=draw.choice([0.0, 0.9]),
        mixup=draw.choice([0.0, 0.3]),
        cutmix=draw.choice([0.0, 1.0]),
        channels_last=draw.random() < 0.5,
        save_steps=draw.choice([1, 3]),
        precision=draw.choice(["float32", "bf16"]),
        optim=replace(EVERYTHING.optim, custom_l2=draw.random() < 0.5, clip=draw.choice([None, 0.5])),
    )
    reference = uninterrupted(server, tmp_path / "whole", config)
    kills = 0
    for attempt in range(60):
        event, most = draw.choice(EVENTS) if attempt else ("step", 20)
        code, text = start(server, tmp_path / "run", config, (event, draw.randint(1, most), KILL))
        if code == 0:
            break
        assert code == -KILL, text
        kills += 1
    assert code == 0
    assert kills > 0
    assert_same(tmp_path / "run", reference)


# Each with the highest count that occurs in a run; steps are drawn more often, since they make the weights.
EVENTS = [
    *(4 * [("step", 20)]),
    ("validation", 6),
    ("epoch written", 2),
    ("checkpoint saved", 10),
    ("half a file", 10),
    ("end", 1),
]


@pytest.mark.slow
def test_killed_run_with_data_workers_resumes(server, expected, tmp_path):
    """Batches, and so all bits, are those of a run without workers."""
    config = with_workers(EVERYTHING, 2)
    for event, count in [("step", 7), ("validation", 2), ("step", 5)]:
        code, text = start(server, tmp_path / "run", config, (event, count, KILL))
        assert code == -KILL, text
    code, text = start(server, tmp_path / "run", config)
    assert code == 0, text
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("step", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (STEPS, 2 * STEPS + 1))])
def test_sigterm_saves_first(server, expected, tmp_path, step):
    """In the middle of an epoch, at its last batch, and right after one that was saved."""
    code, text = start(server, tmp_path / "run", EVERYTHING, ("step", step, TERM))
    assert code == 143
    warning = f"warning: terminated; continue with: repvgg train --config {tmp_path / 'run' / 'config.yaml'} --resume"
    assert text.splitlines()[-1] == warning
    code, text = server("train", "--config", tmp_path / "run" / "config.yaml", "--resume")
    assert code == 0, text
    assert_same(tmp_path / "run", expected)


@pytest.mark.slow
def test_sigterm_during_validation_waits_for_the_epoch(server, expected, tmp_path):
    code, text = start(server, tmp_path / "run", EVERYTHING, ("validation", 1, TERM))
    assert code == 143, text
    assert read_position(tmp_path / "run" / "last.ckpt") == (1, 0, 3)
    assert start(server, tmp_path / "run", EVERYTHING)[0] == 0
    assert_same(tmp_path / "run", expected)


@pytest.mark.slow
def test_sigterm_in_the_last_step_lets_the_run_finish(server, expected, tmp_path):
    code, text = start(server, tmp_path / "run", EVERYTHING, ("step", 3 * STEPS, TERM))
    assert code == 0, text
    assert_same(tmp_path / "run", expected)


def test_ctrl_c_ends_immediately(server, expected, tmp_path):
    code, text = start(server, tmp_path / "run", EVERYTHING, ("step", STEPS + 4, INT))
    assert code == 130
    assert "interrupted" in text
    assert "--resume" in text
    assert "Traceback" not in text
    assert read_position(tmp_path / "run" / "last.ckpt") == (1, 3, 3)
    assert start(server, tmp_path / "run", EVERYTHING)[0] == 0
    assert_same(tmp_path / "run", expected)


def test_a_finished_run_can_be_resumed(server, expected, tmp_path, reference_folder):
    shutil.copytree(reference_folder, tmp_path / "run")
    for name in ("train", "plain"):
        (tmp_path / "run" / f"{name}.safetensors").unlink()
    code, text = start(server, tmp_path / "run", EVERYTHING)
    assert code == 0, text
    assert_same(tmp_path / "run", expected)
