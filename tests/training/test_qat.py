"""Quantization-aware training as a run: its files, and that an interrupted run ends with the same bits."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import repvgg
from repvgg.errors import UsageError
from repvgg.models import describe_model, load, save
from repvgg.quantization import QatNetwork, load_quantized
from repvgg.training import RECIPES, TrainConfig, recipe_of, run
from repvgg.training.config import QatConfig
from tests.bn_statistics import trained_like
from tests.training.helpers import CONFIG, opened, outcome, tiny
from tests.training.test_resume import assert_same, flat, start

KILL = int(signal.SIGKILL)
QAT = QatConfig(enabled=True, weight_bits=4, granularity="per_tensor", equalize=False, calibration_images=20)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two epochs from a checkpoint with statistics that count."""
    model, data = trained_like(tiny()), opened()
    path = tmp_path_factory.mktemp("init") / "train.safetensors"
    about = describe_model(model, "train", input_size=8, mean=data.mean, std=data.std, classes=data.classes)
    save(path, model, about)
    return replace(CONFIG, model="", init=str(path), qat=QAT, ema=0.9, batch_size=24, device_batch=8, save_steps=1)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(config, folder)


def test_a_run_writes_the_integers_it_simulated(config, finished):
    folder, network, data = finished.folder, finished.network, opened()
    assert isinstance(network, QatNetwork)
    plain = load(folder / "plain.safetensors").model.eval()
    integers = load_quantized(folder / "int8.safetensors", plain)
    images, labels = data.val_images(range(data.num_val))
    with torch.no_grad():
        assert_close(integers(images), network(images), rtol=0, atol=0)
    # What was validated is what is in the file, and not what it started from.
    assert int((integers(images).argmax(1) == labels).sum()) == finished.fit.validation.correct
    report = json.loads((folder / "report.json").read_text())
    assert report["int8"]["correct"] == finished.fit.validation.correct
    assert report["plain_form"]["correct"] == finished.plain.correct
    # The train form loads as any other, and quantizing its plain form with the trained ranges gives the integers.
    trained = load(folder / "train.safetensors").model.eval()
    again, _ = repvgg.reparameterize(trained)
    for name, layer in network.layers.items():
        assert_close(again.get_submodule(name).weight, layer.kernel()[0], rtol=0, atol=0)
    before = load_file(config.init)
    after = load_file(folder / "train.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("dense.conv.weight" in name for name in moved)
    assert not any("running" in name for name in moved)
    assert not any("auxiliary" in name for name in moved)


class Interruption(Exception):  # noqa: N818 - not an error
    """Stands for whatever ends a process."""


def test_an_interrupted_run_resumes(config, finished, tmp_path, monkeypatch):
    """While ranges are observed, and after they are frozen."""
    folder, observe = tmp_path / "run", QatNetwork.observe
    for steps in (3, 3):
        calls = iter(range(100))

        def interrupt(network, observing, calls=calls, steps=steps):
            if next(calls) == 3 * steps:  # batches of a step
                raise Interruption
            observe(network, observing)

        monkeypatch.setattr(QatNetwork, "observe", interrupt)
        with pytest.raises(Interruption):
            run(config, folder, resume=True)
    monkeypatch.setattr(QatNetwork, "observe", observe)
    run(config, folder, resume=True)
    assert_same(folder, flat(outcome(finished.folder)))
    expected = load_file(finished.folder / "int8.safetensors")
    assert_close(load_file(folder / "int8.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_killed_process_resumes_and_writes_the_onnx_file(server, config, finished, tmp_path):
    for event, count in [("step", 5), ("step", 2), ("epoch written", 1)]:
        code, text = start(server, tmp_path / "run", config, (event, count, KILL))
        assert code == -KILL, text
    code, text = start(server, tmp_path / "run", config)
    assert code == 0, text
    assert "layers in simulated integers" in text
    assert "int8.onnx beside the simulated integers, ONNX Runtime: agreement 100.00%" in text
    assert_same(tmp_path / "run", flat(outcome(finished.folder)))
    expected = load_file(finished.folder / "int8.safetensors")
    assert_close(load_file(tmp_path / "run" / "int8.safetensors"), expected, rtol=0, atol=0)


def test_the_recipe_needs_a_checkpoint_and_float32(tmp_path):
    assert "qat" in RECIPES
    assert recipe_of("qat").qat.enabled
    assert not TrainConfig().qat.enabled
    with pytest.raises(UsageError, match="trained checkpoint"):
        run(replace(CONFIG, qat=QAT), tmp_path / "run")
    for change, words in (
        ({"precision": "bf16"}, "simulated in float32"),
        ({"compile": True}, "compile"),
        ({"sync_bn": True}, "sync_bn"),
    ):
        with pytest.raises(UsageError, match=words):
            replace(CONFIG, qat=QAT, **change)
    with pytest.raises(UsageError, match="2 to 8 bits"):
        QatConfig(weight_bits=9)
    with pytest.raises(UsageError, match="observe_epochs"):
        QatConfig(observe_epochs=-1)
