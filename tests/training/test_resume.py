"""Killed at any moment and started again, a run ends with the same bits as one that was left alone."""

import signal
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from train_helpers import CONFIG, outcome

from repvgg.training import write_config

KILL, TERM, INT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
EVERYTHING = replace(CONFIG, batch_size=24, device_batch=8, ema=0.9, mixup=0.3, save_steps=1, epochs=3)
STEPS, JUDGED = 12, 3  # forward passes of an epoch of EVERYTHING: 4 steps of 3 rounds; 19 images, 8 at a time


def configured(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder / "wanted.yaml", config, overwrite=True)


def start(server, folder, config, stop=None):
    """Begin a run, or go on with it."""
    file = configured(folder.parent, config)
    return server("train", "--config", file, "--out", folder, "--resume", stop=stop)


def left_alone(server, folder, config):
    code, text = start(server, folder, config)
    assert code == 0, text
    return flat(outcome(folder))


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory):
    return left_alone(server, tmp_path_factory.mktemp("whole") / "run", EVERYTHING)


def assert_same(folder, expected):
    found = flat(outcome(folder))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert found[name] == value, name


def flat(value, name=""):
    """Leaves by the way to them."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf: one for key, part in items for leaf, one in flat(part, f"{name}/{key}").items()}


# Where a run is killed, one process after the other; each goes on from what the one before saved.
SERIES = {
    "steps": [("step", 1), ("step", 5), ("step", 12), ("step", 7), ("step", 1)],
    "judging": [("judging", 2), ("judging", JUDGED + 1)],
    "saving": [("half a file", 1), ("half a file", 3), ("epoch saved", 4), ("half a file", 2), ("epoch kept", 1)],
    "end": [("epoch kept", 2), ("end", 1), ("end", 1)],
}


@pytest.mark.parametrize("series", SERIES)
def test_killed(server, expected, tmp_path, series):
    for event, count in SERIES[series]:
        code, text = start(server, tmp_path / "run", EVERYTHING, (event, count, KILL))
        assert code == -KILL, text
    code, text = start(server, tmp_path / "run", EVERYTHING)
    assert code == 0, text
    assert_same(tmp_path / "run", expected)
    assert not list((tmp_path / "run").glob(".repvgg-*"))
