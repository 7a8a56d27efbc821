"""Helpers of the block tests: non-trivial statistics, and the observable results of one training step."""

import copy

import torch
from torch import nn

from repvgg.blocks import training_kernels


def randomize_norms(module, seed=0):
    """Set batch norms to values as in the middle of a training run; the module is left in training mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            if part.affine:
                part.weight.data.uniform_(0.4, 1.6, generator=generator)
                part.bias.data.uniform_(-1, 1, generator=generator)
            if part.track_running_stats:
                part.running_mean.uniform_(-1, 1, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
                part.num_batches_tracked.fill_(3)
    return module.train()


def images(channels, size=(9, 7), count=2, dtype=torch.float64, layout=torch.contiguous_format, seed=1):
    """Return images whose mean is far from 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *size, generator=generator, dtype=torch.float64) * 2 + 3
    return x.to(dtype).contiguous(memory_format=layout)


def training_step(module, x, kernels="compiled", amp=False):
    """Return output, gradients of input and parameters, and buffers after one step of a copy of ``module``."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    with training_kernels(kernels), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = module(x)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads, **dict(module.named_buffers())}


def is_fused(out):
    """Return whether the compiled passes computed ``out``."""
    return type(out.grad_fn).__name__ == "_FusedBnSumBackward"
