import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.training import evaluate

LABELS = torch.tensor([0, 0, 1, 2, 2])
PREDICTED = torch.tensor([0, 1, 1, 2, 0])


def batches(size=2):
    """The pixel of each image is the class that ``look_up`` predicts."""
    images = PREDICTED.float().reshape(-1, 1, 1, 1)
    return list(zip(images.split(size), LABELS.split(size), strict=True))


def look_up(x):
    return torch.eye(4)[x.flatten().long()] * 5


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_metrics_of_a_worked_example(batch_size):
    result = evaluate(look_up, batches(batch_size))
    assert_close(result.predictions, PREDICTED)
    assert_close(result.labels, LABELS)
    assert_close(result.logits, torch.eye(4)[PREDICTED] * 5)
    assert_close(result.confusion, torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]))
    assert result.correct == 3
    assert result.accuracy == pytest.approx(0.6)
    assert result.per_class[:3].tolist() == [0.5, 1.0, 0.5]
    assert math.isnan(result.per_class[3])  # no image of that class
    assert result.macro_accuracy == pytest.approx(2 / 3)
    assert repr(result) == "Evaluation(3 of 5 correct, 60.00%)"


def test_top_k_of_a_worked_example():
    ranks = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1]])
    result = evaluate(lambda x: ranks, [(torch.zeros(4, 1, 1, 1), torch.tensor([0, 1, 2, 3]))])
    assert [result.top(k) for k in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_images_are_prepared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("two", torch.tensor(2.0))

        def forward(self, x):
            return x * self.two

    halves = [(images / 2, labels) for images, labels in batches()]
    for prepare in (Twice(), lambda x: x * 2):
        assert_close(evaluate(look_up, halves, prepare).predictions, PREDICTED)


def test_a_module_is_evaluated_in_eval_mode_and_restored():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.Dropout(0.9)).train()
    model[1].eval()
    result = evaluate(model, batches())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert_close(result.logits, model[1](PREDICTED.float().reshape(-1, 1)).detach())
    assert not result.logits.requires_grad


def test_modes_are_restored_after_an_error():
    model = nn.Linear(7, 3)
    with pytest.raises(RuntimeError):
        evaluate(model, batches())
    assert model.training
