import copy
import os

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.deploy import SUFFIXES, export_weights, images_for, ship
from repvgg.errors import EquivalenceError, ExportError, OutputExistsError, UsageError

SHAPE = (3, 9, 11)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shipped_file_is_verified(tmp_path, suffix):
    shipped = ship(small(), small(), tmp_path / f"a{suffix}", SHAPE)
    assert os.listdir(tmp_path) == [f"a{suffix}"]
    if suffix == ".safetensors":
        assert (shipped.dynamic_batch, shipped.evidence) == (None, None)
    else:
        assert shipped.dynamic_batch
        assert shipped.evidence.passed
        assert (shipped.evidence.samples, shipped.evidence.batches) == (4, 2)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_unequal_model_is_not_shipped(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text("precious")
    with pytest.raises(EquivalenceError):
        ship(small(), small(1), tmp_path / f"a{suffix}", SHAPE, overwrite=True)
    assert (tmp_path / f"a{suffix}").read_text() == "precious"
    assert os.listdir(tmp_path) == [f"a{suffix}"]


def test_file_that_does_not_run_is_not_shipped(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("nothing\nhere")

    monkeypatch.setattr("repvgg.deploy.shipping.ProgramRunner", lambda path: broken)
    with pytest.raises(ExportError, match=r"does not run: nothing\.$"):
        ship(small(), small(), tmp_path / "a.pt2", SHAPE)
    assert os.listdir(tmp_path) == []


def test_invalid_targets_are_rejected(tmp_path):
    with pytest.raises(UsageError, match=r"end '.*a\.bin' in one of"):
        ship(small(), small(), tmp_path / "a.bin", SHAPE)
    (tmp_path / "a.pt2").touch()
    with pytest.raises(OutputExistsError):
        ship(small(), small(), tmp_path / "a.pt2", SHAPE)


def test_sizes_of_images_for():
    sizes = [tuple(batch.shape) for batch in images_for(small(), SHAPE)]
    assert sizes == [(2, 3, 9, 11), (2, 3, 11, 15), (2, 3, 13, 17)]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 11, 2)).double()
    (only,) = images_for(flat, SHAPE)
    assert only.dtype is torch.float64
    with pytest.raises(UsageError, match="cannot run on images of the shape"):
        images_for(small(), (4, 9, 11))
    with pytest.raises(UsageError, match="at least one channel"):
        images_for(small(), (3, 0, 11))
    with pytest.raises(UsageError, match=r"int64"):
        images_for(Classes(), SHAPE)


class Classes(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class Counting(nn.Module):
    """Increment a buffer in every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.flatten(1)


def test_images_for_leaves_the_model_unchanged():
    model = Counting().train()
    before = copy.deepcopy(model.state_dict())
    images_for(model, SHAPE)
    assert model.training
    assert_close(dict(model.state_dict()), dict(before))


def test_shared_weights(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    export_weights(model, tmp_path / "a.safetensors", SHAPE)
    assert os.listdir(tmp_path) == ["a.safetensors"]


class ExtraState(nn.Module):
    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        pass


def test_state_that_is_not_a_tensor_is_rejected(tmp_path):
    with pytest.raises(ExportError, match="has state that is not a tensor, '_extra_state'"):
        export_weights(ExtraState(), tmp_path / "a.safetensors", SHAPE)


def test_file_that_reads_back_differently_is_rejected(tmp_path, monkeypatch):
    from repvgg.deploy import shipping

    def perturbed(path, tensors, header, **more):
        return save(path, {name: tensor + 1e-7 for name, tensor in tensors.items()}, header, **more)

    save = shipping.save_tensors
    monkeypatch.setattr(shipping, "save_tensors", perturbed)
    with pytest.raises(ExportError, match="differs from the model in 'weight': please report"):
        export_weights(nn.Linear(2, 2, bias=False), tmp_path / "a.safetensors", SHAPE)
    assert os.listdir(tmp_path) == []
