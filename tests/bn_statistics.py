"""Batch norms as training leaves them: every term of a fold counts."""

import torch
from torch import nn


def trained_like(model, seed=0):
    """Statistics and parameters of batch norms that training could have left; the model is in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            bounds = [(module.running_mean, -1, 1), (module.running_var, 0.5, 2)]
            if module.affine:
                bounds += [(module.weight.data, 0.5, 1.5), (module.bias.data, -1, 1)]
            for tensor, low, high in bounds:
                tensor.uniform_(low, high, generator=generator)
    return model.eval()
