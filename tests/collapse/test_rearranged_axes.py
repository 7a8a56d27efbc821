"""Norms before and after permutations, reshapes and means: these stay, and the norm is folded around them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from repvgg import reparameterize
from repvgg.errors import NothingFoldedWarning
from tests.bn_statistics import trained_like


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.other, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(3, 8, 2, 2)
        self.point, self.linear, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5)
        self.bn1, self.bn2 = nn.BatchNorm1d(8), nn.BatchNorm2d(8)
        self.combine = forward

    def forward(self, x):
        return self.combine(self, x)


def through_rows(m, x):
    y = m.linear(F.gelu(m.conv(x).permute(0, 2, 3, 1)))
    return torch.relu(m.bn2(y.permute(0, 3, 1, 2)))


def from_images_to_images(m, x):
    return torch.relu(m.bn2(m.linear(torch.relu(m.conv(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


def tokens(m, x):
    y = m.linear(F.gelu(m.conv(x).flatten(2).transpose(1, 2)))
    return torch.relu(m.bn1(y.flatten(0, 1)).reshape_as(y))


def norm_of_tokens(m, x):
    return torch.relu(m.bn1(m.linear(F.gelu(m.conv(x).flatten(2).transpose(1, 2))).transpose(1, 2)))


FORWARDS = {
    "norm, mean, linear": (lambda m, x: m.head(m.bn2(torch.relu(m.conv(x))).mean((2, 3))), "head"),
    "norm, tokens, mean, linear": (lambda m, x: m.head(m.bn2(torch.relu(m.conv(x))).flatten(2).mean(-1)), "head"),
    "mean, norm, linear": (lambda m, x: m.head(m.bn1(torch.relu(m.conv(x)).mean((2, 3)))), "head"),
    "conv, norm, mean": (lambda m, x: torch.relu(m.bn2(m.conv(x)).mean((2, 3))), "conv"),
    "conv, mean, norm": (lambda m, x: torch.relu(m.bn1(m.conv(x).mean((2, 3)))), "conv"),
    "conv, norm, tokens": (lambda m, x: m.bn2(m.conv(x)).flatten(2).transpose(1, 2).softmax(-1), "conv"),
    "sum, tokens": (lambda m, x: (m.bn2(m.conv(x)) + m.other(x)).flatten(2).softmax(1), "conv"),
    "transposed, norm, tokens": (lambda m, x: m.bn2(m.up(x)).flatten(2).softmax(1), "up"),
    "linear, permute, norm": (through_rows, "linear"),
    "permute, linear, permute, norm": (from_images_to_images, "linear"),
    "linear of tokens, flatten, norm": (tokens, "linear"),
    "linear of tokens, transpose, norm": (norm_of_tokens, "linear"),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("given", [False, True])
def test_norms_are_folded(name, given):
    forward, folded = FORWARDS[name]
    model = trained_like(Net(forward)).double()
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = []
    for part in (model.bn1, model.bn2):
        part.register_forward_hook(lambda m, args, y: norms.append(m))
    model(x)
    for part in (model.bn1, model.bn2):
        part._forward_hooks.clear()
    plain, report = reparameterize(model, x if given else None)
    (entry,) = report.folded
    assert entry.name.startswith(folded) or name == "sum, tokens"
    assert len(norms) == 1
    assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)
    for again in (torch.randn(1, 3, 12, 7, dtype=torch.float64), torch.randn(3, 3, 5, 6, dtype=torch.float64)):
        assert_close(plain(again), model(again), rtol=1e-10, atol=1e-10)


def test_a_mean_is_not_moved_where_that_would_cost_more():
    """Folding the head into the convolution would compute it for each pixel."""
    model = Net(lambda m, x: F.linear(m.conv(x).mean((2, 3)), m.head.weight.repeat(8, 1))).double().eval()
    with pytest.warns(NothingFoldedWarning):
        reparameterize(model, torch.randn(1, 3, 9, 9, dtype=torch.float64))
