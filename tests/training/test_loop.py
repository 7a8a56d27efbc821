"""``fit`` on tiny models: what it learns, records, refuses, restores and repeats."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.testing import assert_close

import repvgg.training.task as tasks
from repvgg.data import AffineJitter, Augment, DataConfig, TrainLoader, open_data
from repvgg.errors import DataError, TrainingError, UsageError
from repvgg.models import TrainingOutput, create_model
from repvgg.training import OptimConfig, classification_loss, evaluate, fit, quickstart, seeded
from tests.training.helpers import CONFIG, fingerprint, opened, tiny

DIGITS = replace(
    CONFIG,
    batch_size=64,
    data=DataConfig(
        uri="digits:", train_size=8, augment=Augment(jitter=AffineJitter(degrees=5, translate=0.05, scale=0.05))
    ),
    optim=OptimConfig(lr=0.1, lr_batch=None, weight_decay=1e-4, warmup_epochs=0.5),
    channels_last=True,
)


def run(config=CONFIG, seed=0, **more):
    model = tiny(seed)
    return model, fit(model, opened(config), config, progress=False, **more)


def observe_steps(monkeypatch, observe):
    """Call ``observe(task, batch, loss)`` after every training step."""
    original = tasks.ClassificationTask.training_step

    def step(self, batch, index):
        loss = original(self, batch, index)
        observe(self, batch, loss)
        return loss

    monkeypatch.setattr(tasks.ClassificationTask, "training_step", step)


class ObservedLoader(TrainLoader):
    """Yields the batches of another loader, and calls a function with each first."""

    def __init__(self, loader, observe):
        self.loader, self.observe = loader, observe

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.observe(batch)
            yield batch

    def set_epoch(self, epoch):
        self.loader.set_epoch(epoch)

    def skip(self, batches):
        self.loader.skip(batches)


def observed(observe, part="train_batches", config=CONFIG):
    data = opened(config)
    original = getattr(data, part)
    setattr(data, part, lambda *size, **ranks: ObservedLoader(original(*size, **ranks), observe))
    return data


def test_learns_and_records_every_epoch():
    config = replace(DIGITS, epochs=3)
    data = opened(config)
    model = tiny(0, 10, 1)
    result = fit(model, data, config, progress=False)
    assert [record.epoch for record in result.history] == [1, 2, 3]
    assert result.history[-1].loss < 0.8 * result.history[0].loss
    assert result.accuracy > 0.7
    assert result.history[-1].held_out_accuracy == pytest.approx(result.accuracy)
    assert result.history[-1].held_out_top5 == pytest.approx(result.validation.top(5))
    assert result.history[-1].held_out_top5 > result.accuracy
    assert 0 < sum(record.seconds for record in result.history) < result.seconds
    assert all(record.images_per_second > 0 for record in result.history)
    assert not any(module.training for module in model.modules())
    assert all(value.is_contiguous() for value in model.state_dict().values())
    again = evaluate(model, data.val_batches(100), data.prepare)
    assert_close(result.validation.logits, again.logits)
    assert len(result.validation.labels) == data.num_val


def test_equal_seeds_give_equal_bits():
    torch.manual_seed(1)
    first, _ = run()
    torch.manual_seed(2)
    torch.rand(3)
    second, _ = run()
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(run(replace(CONFIG, seed=1))[0]) != fingerprint(first)
    assert fingerprint(run(seed=1)[0]) != fingerprint(first)


def test_global_state_is_restored(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    state, environment, threads = torch.get_rng_state(), dict(os.environ), torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(replace(CONFIG, threads=1, ema=0.5, mixup=0.2))
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert_close(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == environment
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_configs_and_recipes_do_without_the_extra():
    """In one process: nothing of the extra is imported, and where it is missing, ``fit`` says how to install it."""
    code = """
import sys, repvgg.training
from repvgg.errors import MissingDependencyError
extra = {'lightning', 'torchvision', 'torchmetrics', 'matplotlib', 'tensorboard'}
print((extra | {'rich'}) & {name.partition('.')[0] for name in sys.modules})
sys.modules |= dict.fromkeys(extra)  # importing them fails from here on
print(repvgg.training.recipe_of('cifar').epochs)
for use in (lambda: repvgg.training.fit, lambda: repvgg.training.evaluate(len, [])):
    try:
        use()
    except MissingDependencyError as error:
        print(error)
"""
    out, err = fresh_process(code)
    assert out.splitlines() == [
        "set()",
        "20",
        "This needs 'lightning', which is not installed: pip install 'repvgg[train]'.",
        "This needs 'torchmetrics', which is not installed: pip install 'repvgg[train]'.",
    ]
    assert err == ""


@pytest.mark.slow
def test_prints_nothing_in_a_fresh_process():
    """Warnings that are shown once per process, and Lightning's log lines, would appear here."""
    code = (
        "from repvgg.training import TrainConfig, fit; from repvgg.data import DataConfig, open_data\n"
        "from torch import nn\n"
        "config = TrainConfig(epochs=1, data=DataConfig(uri='digits:', train_size=8), accelerator='cpu')\n"
        "model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "print(fit(model, open_data(config.data), config, progress=False).history[0].epoch)"
    )
    assert fresh_process(code) == ("1\n", "")


def test_shows_one_line():
    screen = io.StringIO()
    fit(tiny(), opened(), CONFIG, console=Console(file=screen, width=120, force_terminal=True))
    shown = screen.getvalue()
    assert "epoch 2/2" in shown
    assert "loss" in shown
    assert "validation" in shown
    assert "took" in shown


def test_runs_on_the_configured_number_of_threads():
    seen, before = set(), torch.get_num_threads()
    data = observed(lambda batch: seen.add(torch.get_num_threads()))
    fit(tiny(), data, replace(CONFIG, threads=before + 2), progress=False)
    assert seen == {before + 2}


@pytest.fixture
def default_sigint_handler():
    """Python does not install its handler where a shell started it in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint_handler")
@pytest.mark.parametrize("part", ["train_batches", "val_batches"])
def test_ctrl_c_raises_keyboard_interrupt(part):
    seen = []

    def interrupt(batch):
        seen.append(batch)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler, model = signal.getsignal(signal.SIGINT), tiny()
    with pytest.raises(KeyboardInterrupt):
        fit(model, observed(interrupt, part), CONFIG, console=Console(file=io.StringIO()))
    assert len(seen) == 2  # immediately
    assert signal.getsignal(signal.SIGINT) is handler
    assert not torch.are_deterministic_algorithms_enabled()
    assert not model.training


def test_errors_of_the_data_are_raised_unchanged():
    def fail(batch):
        raise DataError("image 3 is corrupt")

    with pytest.raises(DataError, match="image 3 is corrupt"):
        fit(tiny(), observed(fail), CONFIG, progress=False)


@pytest.mark.parametrize(
    ("model", "change", "text"),
    [
        (lambda: tiny(num_classes=9), {}, "4 classes"),
        (lambda: tiny(in_channels=1), {}, r"images of shape \(3, 8, 8\)"),
        (tiny, {"batch_size": 97}, "96 training images do not fill one batch of 97"),
        (tiny, {"device_batch": 1}, "at least 2 images at a time"),
        (tiny, {"precision": "fp16"}, "Training in fp16 is not supported on a CPU: take auto"),
    ],
)
def test_unsupported_configs_are_rejected(model, change, text):
    model = model()
    before = fingerprint(model)
    with pytest.raises(UsageError, match=text):
        fit(model, opened(), replace(CONFIG, **change), progress=False)
    assert fingerprint(model) == before
    assert model.training


def test_a_non_finite_loss_ends_the_run(monkeypatch):
    observe_steps(monkeypatch, lambda task, batch, loss: None)
    monkeypatch.setattr(tasks, "classification_loss", lambda output, *_: output.logits.sum() * float("inf"))
    with pytest.raises(TrainingError, match=r"The loss of epoch 1 is (nan|inf): take a lower learning rate"):
        run()


def test_loss_with_auxiliary_heads_equals_its_formula():
    labels = torch.tensor([0, 2])
    main, first, second = torch.randn(3, 2, 4)
    cross = [F.cross_entropy(logits, labels, label_smoothing=0.2) for logits in (main, first, second)]
    assert_close(classification_loss(main, labels, 0.2), cross[0])
    output = TrainingOutput(main, (first, second))
    assert_close(classification_loss(output, labels, 0.2), cross[0] + 0.1 * (cross[1] + cross[2]))
    assert_close(classification_loss(output, labels, 0.2, 0.0), cross[0])


def test_label_smoothing_equals_its_formula():
    """With ε: ``−(1 − ε) log p_y − ε / K · Σ log p_k``."""
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    p = logits.log_softmax(1)
    expected = -(0.7 * p[range(5), labels] + 0.3 / 4 * p.sum(1)).mean()
    assert_close(classification_loss(logits, labels, 0.3), expected)


def test_auxiliary_heads_are_trained():
    model, before = tiny(), tiny().auxiliary["stage0"].head.weight
    fit(model, opened(), replace(CONFIG, optim=replace(CONFIG.optim, weight_decay=0.0)), progress=False)
    assert (model.auxiliary["stage0"].head.weight - before).abs().max() > 1e-4


@pytest.mark.parametrize("change", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_labels_reach_the_loss(monkeypatch, change):
    """Each target is a mixture of two classes."""
    seen = []
    original = tasks.classification_loss

    def loss(output, targets, *more):
        seen.append(targets)
        return original(output, targets, *more)

    monkeypatch.setattr(tasks, "classification_loss", loss)
    mixed, _ = run(replace(CONFIG, **change))
    assert {tuple(targets.shape) for targets in seen} == {(16, 4)}
    assert_close(torch.cat(seen).sum(1), torch.ones(12 * 16))
    weights = torch.stack([targets.amax(1).min() for targets in seen])
    assert weights.min() < 0.95
    assert len(set(weights.tolist())) > 5  # drawn again for every batch
    assert fingerprint(mixed) != fingerprint(run()[0])
    assert fingerprint(mixed) == fingerprint(run(replace(CONFIG, **change))[0])


def test_progressive_resizing_starts_small(monkeypatch):
    """6 steps an epoch: 3 of 12 steps at 4 pixels, 3 at 6, and the others at the 8 of the data."""
    sizes = []
    original = tasks.ClassificationTask.mix

    def mix(task, images, targets):
        sizes.append(images.shape[-1])
        return original(task, images, targets)

    monkeypatch.setattr(tasks.ClassificationTask, "mix", mix)
    run(replace(CONFIG, progressive=((0.25, 0.5), (0.5, 0.75))))
    assert sizes == [4] * 3 + [6] * 3 + [8] * 6


@pytest.mark.parametrize(("device_batch", "precision"), [(None, "float32"), (8, "float32"), (None, "bf16")])
def test_gradients_are_clipped(monkeypatch, device_batch, precision):
    norms = []
    original = torch.optim.SGD.step

    def step(self, closure=None):
        out = closure()
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return original(self) if out is None else (original(self), out)[1]

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    optim = OptimConfig(lr=0.05, lr_batch=None)
    free = replace(CONFIG, device_batch=device_batch, precision=precision, epochs=1, optim=optim)
    run(free)
    assert max(norms) > 0.2
    norms.clear()
    run(replace(free, optim=replace(free.optim, clip=0.1)))
    assert max(norms) <= 0.1 * (1 + 1e-5)
    assert max(norms) > 0.0999


def test_accumulated_gradients_are_those_of_the_batch():
    """Without batch norm, whose statistics depend on the batch size."""
    weights = []
    for device_batch in (None, 4):
        with seeded("linear"):
            model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
        fit(model, opened(), replace(CONFIG, device_batch=device_batch), progress=False)
        weights.append(model[1].weight.detach())
    assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_the_learning_rate_scales_with_the_batch(monkeypatch):
    rates = []
    observe_steps(monkeypatch, lambda task, *_: rates.append(task.optimizers().param_groups[0]["lr"]))
    config = replace(CONFIG, epochs=1, optim=OptimConfig(lr=0.32, lr_batch=64, warmup_epochs=0.0))
    _, result = run(config)
    assert rates[0] == pytest.approx(0.08)
    assert (result.plan.lr, result.plan.lr_scale) == pytest.approx((0.08, 0.25))
    assert rates == sorted(rates, reverse=True)
    assert result.history[0].lr < 0.01


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"channels_last": True}, {"sync_bn": True}])
def test_options_of_the_arithmetic_change_little(change):
    _, reference = run(replace(CONFIG, epochs=1))
    model, changed = run(replace(CONFIG, epochs=1, **change))
    tolerance = 0.05 if "precision" in change else 1e-4
    assert changed.history[0].loss == pytest.approx(reference.history[0].loss, rel=tolerance)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_bf16_computes_in_bf16(monkeypatch):
    kinds = set()
    observe_steps(monkeypatch, lambda task, *_: None)
    model = tiny()
    model.stem.conv.dense.conv.register_forward_hook(
        lambda module, inputs, out: kinds.add((module.training, out.dtype))
    )
    fit(model, opened(), replace(CONFIG, epochs=1, precision="bf16"), progress=False)
    assert (True, torch.bfloat16) in kinds
    assert (False, torch.float32) in kinds  # the final evaluation


@pytest.mark.slow
def test_compiled(monkeypatch, tmp_path):
    compile_, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or compile_(model))
    _, plain = run(replace(CONFIG, ema=0.5))
    config = replace(CONFIG, compile=True, ema=0.5)
    model, compiled = run(config, folder=tmp_path)
    assert calls == [model]
    assert [record.loss for record in compiled.history] == pytest.approx(
        [record.loss for record in plain.history], rel=1e-2
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {f"model.{name}" for name in model.state_dict()} == set(saved["current_model_state"])
    again, _ = run(config, folder=tmp_path, resume=True)
    assert fingerprint(again) == fingerprint(model)


def test_only_training_images_are_augmented():
    seen = []
    data = observed(lambda batch: seen.append(batch[0].clone()))
    fit(tiny(), data, CONFIG, progress=False)
    validation = [torch.cat([images for images, _ in opened().val_batches(8)]) for _ in range(2)]
    assert_close(validation[0], validation[1], rtol=0, atol=0)
    first, second = torch.cat(seen[:6]), torch.cat(seen[6:])
    whole = {tuple(image.flatten().tolist()) for image in first}
    again = {tuple(image.flatten().tolist()) for image in second}
    assert 0.2 * 96 < len(whole & again) < 0.8 * 96  # as in the first epoch: one half


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_quickstart_reaches_99_percent(seed):
    config = quickstart(seed)
    with seeded("model", config.seed):
        model = create_model("repvgg_t0", num_classes=10, in_channels=1)
    result = fit(model, open_data(config.data, seed=seed), config, progress=False)
    assert result.accuracy >= 0.99


@pytest.mark.slow
def test_quickstart_is_reproducible():
    config = replace(quickstart(3), epochs=3)
    prints = []
    for _ in range(2):
        with seeded("model", config.seed):
            model = create_model("repvgg_t0", num_classes=10, in_channels=1)
        fit(model, open_data(config.data, seed=config.seed), config, progress=False)
        prints.append(fingerprint(model))
    assert prints[0] == prints[1]
