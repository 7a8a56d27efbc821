import hashlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from repvgg.data import AffineJitter, ImagesInMemory, LabelledImages, digits
from repvgg.errors import UsageError
from repvgg.models import ModelSpec, Stage, TrainingOutput, create_model
from repvgg.training import (
    ClassificationTask,
    OptimConfig,
    TrainConfig,
    classification_loss,
    evaluate,
    fit,
    quickstart,
    seeded,
)
from repvgg.training.fitting import _trainer
from repvgg.training.quiet import lightning_as_guest

SPEC = ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(1, 8), Stage(2, 16)), auxiliary=(0,))
CONFIG = TrainConfig(
    epochs=2,
    batch_size=64,
    optim=OptimConfig(lr=0.1, weight_decay=1e-4, warmup_epochs=0.5),
    label_smoothing=0.1,
    augment=AffineJitter(degrees=5, translate=0.05, scale=0.05),
    threads=1,
    channels_last=True,
)


@pytest.fixture(scope="module")
def data():
    """320 digits at 8x8 to train on, 100 to judge by."""
    whole = digits(8)
    return replace(
        whole,
        train=ImagesInMemory(whole.train.images[:320], whole.train.labels[:320]),
        held_out=ImagesInMemory(whole.held_out.images[:100], whole.held_out.labels[:100]),
    )


def tiny(seed=0, num_classes=10, in_channels=1):
    with seeded(seed):
        return create_model(SPEC, num_classes, in_channels)


def fingerprint(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def run(data, config=CONFIG, seed=0):
    model = tiny(seed)
    return model, fit(model, data, config, progress=False)


def test_learns_and_records_every_epoch(data):
    model, result = run(data, replace(CONFIG, epochs=6))
    assert [record.epoch for record in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.history[-1].loss < 0.8 * result.history[0].loss
    assert result.accuracy > 0.5
    assert result.history[-1].held_out_accuracy == pytest.approx(result.accuracy)
    assert 0 < sum(record.seconds for record in result.history) < result.seconds
    assert not any(module.training for module in model.modules())
    assert all(value.is_contiguous() for value in model.state_dict().values())
    again = evaluate(model, data.held_out)
    assert_close(result.held_out.logits, again.logits)
    assert_close(result.held_out.confusion.sum(1), data.held_out.labels.bincount(minlength=10))


def test_the_same_seed_gives_the_same_bits(data):
    torch.manual_seed(1)
    first, _ = run(data)
    torch.manual_seed(2)
    torch.rand(3)
    second, _ = run(data)
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(run(data, replace(CONFIG, seed=1))[0]) != fingerprint(first)
    assert fingerprint(run(data, seed=1)[0]) != fingerprint(first)


def test_leaves_the_world_as_it_was(data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    state, environment, threads = torch.get_rng_state(), dict(os.environ), torch.get_num_threads()
    run(data, replace(CONFIG, threads=1))
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert_close(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == environment


def fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_importing_the_room_is_cheap():
    code = "import repvgg.training, sys; print({'lightning', 'torchvision', 'torchmetrics', 'rich'} & set(sys.modules))"
    assert fresh_process(code) == ("set()\n", "")


@pytest.mark.slow
def test_says_nothing_in_a_fresh_process():
    """Warnings that are shown once a process, and lines that Lightning logs, would be seen here."""
    code = (
        "from repvgg.training import TrainConfig, fit; from repvgg.data import digits; from torch import nn;"
        "model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10));"
        "print(fit(model, digits(8), TrainConfig(epochs=1, batch_size=256), progress=False).history[0].epoch)"
    )
    assert fresh_process(code) == ("1\n", "")


def test_shows_one_line(data):
    screen = io.StringIO()
    model = tiny()
    fit(model, data, CONFIG, console=Console(file=screen, width=120, force_terminal=True))
    shown = screen.getvalue()
    assert "epoch 2/2" in shown
    assert "loss" in shown
    assert "held-out" in shown
    assert "took" in shown


def test_runs_on_as_many_threads_as_asked(data):
    class Counting(LabelledImages):
        threads: ClassVar = set()

        def __len__(self):
            return 320

        def __getitem__(self, index):
            self.threads.add(torch.get_num_threads())
            return data.train[index]

    before = torch.get_num_threads()
    fit(tiny(), replace(data, train=Counting()), replace(CONFIG, epochs=1, threads=before + 2), progress=False)
    assert Counting.threads == {before + 2}


class Interrupting(LabelledImages):
    """Sends the process the signal of Ctrl-C when image ``at`` is asked for."""

    def __init__(self, images, at):
        self.images, self.left = images, at

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.images[index]


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_ctrl_c_is_ctrl_c(data, part):
    handler, model = signal.getsignal(signal.SIGINT), tiny()
    interrupting = Interrupting(getattr(data, part), 90)
    with pytest.raises(KeyboardInterrupt):
        fit(model, replace(data, **{part: interrupting}), CONFIG, console=Console(file=io.StringIO()))
    assert interrupting.left == 0  # at once
    assert signal.getsignal(signal.SIGINT) is handler
    assert not torch.are_deterministic_algorithms_enabled()
    assert not model.training


def test_other_errors_come_through_as_they_are(data):
    class Broken(LabelledImages):
        def __len__(self):
            return 320

        def __getitem__(self, index):
            raise ValueError("image 3 is torn")

    with pytest.raises(ValueError, match="image 3 is torn"):
        fit(tiny(), replace(data, train=Broken()), CONFIG, progress=False)


@pytest.mark.parametrize(
    ("model", "config", "text"),
    [
        (lambda: tiny(num_classes=9), CONFIG, "10 classes"),
        (lambda: tiny(in_channels=3), CONFIG, r"images of shape \(1, 8, 8\)"),
        (tiny, replace(CONFIG, batch_size=321), "320 training images"),
    ],
)
def test_refuses_what_does_not_fit(data, model, config, text):
    model = model()
    before = fingerprint(model)
    with pytest.raises(UsageError, match=text):
        fit(model, data, config, progress=False)
    assert fingerprint(model) == before
    assert model.training


def test_loss_with_auxiliary_heads_by_hand():
    labels = torch.tensor([0, 2])
    main, first, second = torch.randn(3, 2, 4)
    cross = [F.cross_entropy(logits, labels, label_smoothing=0.2) for logits in (main, first, second)]
    assert_close(classification_loss(main, labels, 0.2), cross[0])
    output = TrainingOutput(main, (first, second))
    assert_close(classification_loss(output, labels, 0.2), cross[0] + 0.1 * (cross[1] + cross[2]))
    assert_close(classification_loss(output, labels, 0.2, 0.0), cross[0])


def test_auxiliary_heads_are_trained(data):
    model, before = tiny(), tiny().auxiliary["stage0"].head.weight
    fit(model, data, replace(CONFIG, epochs=1, optim=OptimConfig(weight_decay=0.0)), progress=False)
    assert (model.auxiliary["stage0"].head.weight - before).abs().max() > 1e-4


def test_augmentation_is_applied_while_training_only(data):
    class Counting(nn.Module):
        calls = 0  # of forward

        def forward(self, x):
            self.calls += 1
            return x

    augment = Counting()
    task = ClassificationTask(tiny(), replace(CONFIG, epochs=1), 10, augment)
    batches = DataLoader(ImagesInMemory(data.train.images[:48], data.train.labels[:48]), 16)
    with lightning_as_guest():
        _trainer(task.config, [], "cpu").fit(task, batches, batches)
    assert augment.calls == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_quickstart_reaches_99_percent(seed):
    config = quickstart(seed)
    with seeded("model", config.seed):
        model = create_model("repvgg_t0", num_classes=10, in_channels=1)
    result = fit(model, digits(), config, progress=False)
    assert result.accuracy >= 0.99
