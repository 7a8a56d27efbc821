"""The moving average of the weights, compared with a plain loop over the weights of every step."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import repvgg.training.task as tasks
from repvgg.training import evaluate, fit
from tests.training.helpers import CONFIG, opened, tiny


@pytest.mark.parametrize("device_batch", [None, 8])
def test_average_matches_a_plain_loop(monkeypatch, device_batch):
    config = replace(CONFIG, ema=0.8, device_batch=device_batch)
    seen = []
    original = tasks.ClassificationTask.training_step

    def step(self, batch, index):
        # At the start of a step: the weights and running statistics that the previous step left.
        if index % self.plan.accumulation == 0:
            seen.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return original(self, batch, index)

    monkeypatch.setattr(tasks.ClassificationTask, "training_step", step)
    reported = []
    averaged = tiny()
    fit(averaged, opened(), config, progress=False, on_epoch=lambda _, weights: reported.append(copies(weights)))
    plain = tiny()
    fit(plain, opened(), replace(config, ema=0.0), progress=False)

    states = [*seen[1:12], plain.state_dict()]  # after each of 12 steps; both runs take the same ones
    assert len(seen) == 24
    average = copies(states[0])
    for n, state in enumerate(states[1:], start=1):
        decay = min(0.8, (1 + n) / (10 + n))
        for name, value in state.items():
            mean = decay * average[name] + (1 - decay) * value
            average[name] = mean if value.is_floating_point() else value
    assert_close(dict(averaged.state_dict()), average, rtol=1e-5, atol=1e-6)
    assert_close(reported[-1], dict(averaged.state_dict()), rtol=0, atol=0)
    batches = 24 if device_batch else 12
    assert int(averaged.stem.conv.dense.bn.num_batches_tracked) == batches
    assert (averaged.head.weight - plain.head.weight).abs().max() > 1e-3


def copies(state):
    return {name: value.clone() for name, value in state.items()}


def test_the_average_is_validated():
    config = replace(CONFIG, ema=0.99)
    model, data = tiny(), opened()
    accuracies = []

    def evaluate_again(history, weights):
        other = tiny()
        other.load_state_dict(weights)
        accuracies.append((history[-1].held_out_accuracy, evaluate(other, data.val_batches(8), data.prepare).accuracy))

    result = fit(model, data, config, progress=False, on_epoch=evaluate_again)
    assert len(accuracies) == 2
    for recorded, again in accuracies:
        assert recorded == pytest.approx(again)
    assert result.accuracy == pytest.approx(accuracies[-1][1])
    assert torch.isfinite(result.validation.logits).all()
