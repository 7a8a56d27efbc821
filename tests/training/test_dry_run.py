"""The dry run finds problems before the first epoch."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import repvgg.training.dry_run as dry_runs
from repvgg.collapse import reparameterize
from repvgg.errors import EquivalenceError, TrainingError
from repvgg.training import perform_dry_run, run
from tests.bn_statistics import trained_like
from tests.training.helpers import CONFIG, fingerprint, opened, tiny


def test_reports_the_outcome():
    model = trained_like(tiny())
    before, state = fingerprint(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    result = perform_dry_run(model, opened(), CONFIG)
    assert result.regions == 4
    assert result.evidence.passed
    assert result.evidence.relative > 0
    assert str(result).startswith(
        f"dry run: loss {result.loss:.3f}, all gradients finite; collapses into 4 convolutions"
    )
    assert fingerprint(model) == before
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert perform_dry_run(model, opened(), CONFIG).loss == result.loss


def test_a_plain_model_is_not_collapsed():
    plain, _ = reparameterize(trained_like(tiny()).eval())
    result = perform_dry_run(plain, opened(), CONFIG)
    assert (result.regions, result.evidence) == (0, None)
    assert str(result).endswith("the model is plain already")


def test_a_parameter_without_gradient():
    model = tiny()
    model.forgotten = nn.Parameter(torch.ones(3))
    with pytest.raises(TrainingError, match=r"^'forgotten' gets no gradient: freeze it \(requires_grad=False\), or"):
        perform_dry_run(model, opened(), CONFIG)
    model.forgotten.requires_grad_(False)
    assert perform_dry_run(model, opened(), CONFIG).evidence.passed


def test_an_infinite_loss():
    model = tiny()
    nn.init.constant_(model.head.bias, float("inf"))
    with pytest.raises(TrainingError, match="first batch gives a loss of nan: look at its images with 'repvgg data"):
        perform_dry_run(model, opened(), CONFIG)


class Steep(nn.Module):
    """A net after a parameter whose gradient is infinite at its initial value."""

    def __init__(self):
        super().__init__()
        self.net = tiny()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.net(x + self.gain.sqrt())


def test_an_infinite_gradient():
    with pytest.raises(
        TrainingError, match=r"^The gradient of 'gain' is not finite on the first batch: check how forward"
    ):
        perform_dry_run(Steep(), opened(), CONFIG)


def break_the_collapse(monkeypatch):
    original = reparameterize

    def wrong(model, *inputs):
        plain, report = original(model, *inputs)
        with torch.no_grad():
            next(plain.parameters()).mul_(1.01)
        return plain, report

    monkeypatch.setattr(dry_runs, "reparameterize", wrong)


def test_a_collapse_that_is_not_equal(monkeypatch):
    break_the_collapse(monkeypatch)
    with pytest.raises(EquivalenceError, match=r"^The model would not collapse into an equal one after training: "):
        perform_dry_run(trained_like(tiny()), opened(), CONFIG)


def test_only_before_a_new_run(monkeypatch, tmp_path):
    runs = []
    monkeypatch.setattr("repvgg.training.run_folder.draw_curve", lambda *_: None)  # slow
    monkeypatch.setattr("repvgg.training.run_folder.perform_dry_run", lambda *_: runs.append(1) or "dry run")
    config = replace(CONFIG, epochs=1, optim=replace(CONFIG.optim, warmup_epochs=0), dry_run=True)
    run(config, tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    run(replace(config, dry_run=False), tmp_path / "other")
    assert runs == [1]


def test_nothing_is_trained_if_it_fails(monkeypatch, tmp_path):
    break_the_collapse(monkeypatch)
    monkeypatch.setattr("repvgg.training.run_folder.fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(EquivalenceError):
        run(replace(CONFIG, dry_run=True), tmp_path / "run")
    assert not (tmp_path / "run" / "last.ckpt").exists()
