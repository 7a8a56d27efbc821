"""Small models with the batch-norm statistics of trained ones, and copies folded by PyTorch."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def trained_like(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set statistics at which every term of a fold matters; the model stays in training mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(True)
    )


class Net(nn.Module):
    """Two conv-BN-ReLU blocks with in-place ReLUs, a pool and a classifier."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first = conv_bn_relu(3, 8)
        self.second = conv_bn_relu(8, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return trained_like(Net(), seed)


def folded(model: nn.Module) -> nn.Module:
    """Return a copy in the same dtype, with each batch norm folded in float64 by PyTorch's own function."""
    out = copy.deepcopy(model).double().eval()
    for block in (out.first, out.second):
        block[0] = fuse_conv_bn_eval(block[0], block[1])
        block[1] = nn.Identity()
    return out.to(model.head.weight.dtype)
