import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.data import ImagesInMemory
from repvgg.training import evaluate

LABELS = torch.tensor([0, 0, 1, 2, 2])
PREDICTED = torch.tensor([0, 1, 1, 2, 0])


def images():
    """Each image says on its pixels what a lookup will predict."""
    return ImagesInMemory(PREDICTED.float().reshape(-1, 1, 1, 1), LABELS)


def look_up(x):
    return torch.eye(3)[x.flatten().long()] * 5


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_by_hand(batch_size):
    result = evaluate(look_up, images(), batch_size)
    assert_close(result.predictions, PREDICTED)
    assert_close(result.labels, LABELS)
    assert_close(result.logits, torch.eye(3)[PREDICTED] * 5)
    assert_close(result.confusion, torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 1]]))
    assert result.correct == 3
    assert result.accuracy == pytest.approx(0.6)
    assert repr(result) == "Evaluation(3 of 5 right, 60.00%)"


def test_a_module_is_judged_in_eval_mode_and_put_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.Dropout(0.9)).train()
    model[1].eval()
    result = evaluate(model, images())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert_close(result.logits, model[1](PREDICTED.float().reshape(-1, 1)).detach())
    assert not result.logits.requires_grad


def test_modes_are_put_back_after_an_error():
    model = nn.Linear(7, 3)
    with pytest.raises(RuntimeError):
        evaluate(model, images())
    assert model.training
