"""Networks of which the engine runs some parts, and PyTorch the others."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg.engine
from repvgg.engine import CompiledModel, PartitionedModel, TorchFallback
from repvgg.errors import FallbackWarning, UsageError


class Attention(nn.Module):
    """Tokens attend to those before them, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 5)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        n = x.shape[0]
        y = F.relu_(self.stem(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).view(n, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, -1, 16)
        y = y + self.out(z)
        return {"logits": self.head(y.mean(1)), "tokens": y}


class Mixed(nn.Module):
    """Functions that the engine has not, some in place, that depend on the number of images and on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x, y):
        x = self.norm(self.one(x))
        z = F.threshold(x, 0.1, 20.0, True).view(x.shape[0] * 2, 4, -1).cumsum(0)
        return self.two(x) * y, [z[:2], self.two(F.softplus(y))]


def compiled(model: nn.Module, *inputs: torch.Tensor):
    shapes = [tuple(x.shape) for x in inputs]
    with pytest.warns(FallbackWarning, match="PyTorch runs parts of .*, because the engine cannot: "):
        return repvgg.engine.compile(model, shapes if len(shapes) > 1 else shapes[0], 1, fallback=True)


def test_attention():
    model, x = Attention().eval(), torch.randn(3, 3, 12, 10)
    fast = compiled(model, x)
    assert isinstance(fast, PartitionedModel)
    for images in (x, x[:1], torch.randn(5, 3, 12, 10), torch.randn(2, 3, 16, 6)):
        with torch.no_grad():
            torch.testing.assert_close(fast(images), model(images), rtol=1e-5, atol=1e-5)
    found = fast(x.numpy())
    np.testing.assert_allclose(found["logits"], model(x)["logits"].detach().numpy(), rtol=1e-5, atol=1e-5)
    lines = str(compiled(model, x)).splitlines()
    assert lines[0].startswith("Attention in")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["engine", "PyTorch", "engine"]
    assert "scaled_dot_product_attention" in lines[2]
    with pytest.raises(UsageError, match="takes float32 images"):
        fast(x.double())


def test_several_inputs_in_place_and_numbers_that_depend_on_the_batch():
    model, x, y = Mixed().eval(), torch.randn(4, 3, 7, 9), torch.randn(4, 8, 7, 9)
    fast = compiled(model, x, y)
    for count in (4, 2, 1):
        given = x[:count], y[:count]
        before = [one.clone() for one in given]
        with torch.no_grad():
            torch.testing.assert_close(fast(*given), model(*given), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


def test_what_has_no_worthwhile_part_runs_in_pytorch():
    with pytest.warns(FallbackWarning, match="PyTorch runs Sequential, because"):
        slow = repvgg.engine.compile(nn.Sequential(nn.ReLU(), nn.Hardshrink()), (1, 3, 8, 8), fallback=True)
    assert isinstance(slow, TorchFallback)


def test_what_the_engine_supports_is_not_partitioned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(repvgg.engine.compile(nn.Conv2d(3, 4, 3), (1, 3, 8, 8), 1, fallback=True), CompiledModel)
