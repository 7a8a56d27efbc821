"""Shared helpers: trained-looking models, images, and the state that must not change."""

import copy
import random

import torch
from torch import Tensor, nn

import repvgg


def trained(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return the model in eval mode with parameters and statistics far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.5, generator=generator)
                part.running_var.uniform_(0.3, 2.5, generator=generator)
                part.weight.normal_(1, 0.4, generator=generator)
                part.bias.normal_(0, 0.4, generator=generator)
            if isinstance(part, nn.Conv2d) and "weight" in part._parameters:
                part.weight.normal_(0, 1.5 / part.weight[0].numel() ** 0.5, generator=generator)
                if part.bias is not None:
                    part.bias.normal_(0, 0.5, generator=generator)
    return model.to(dtype).eval()


def vgg(channels: int = 8) -> nn.Sequential:
    """Return a small plain network with every kind of layer of a VGG."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, 2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 5),
    )


def module(forward, **parts) -> nn.Module:
    """Return a module with the given parts and forward."""
    out = type("Written", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(out, name, part)
    return out


def image(
    channels: int = 3, height: int = 13, width: int = 18, *, batch: int = 2, seed: int = 1, dtype=torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64).add(0.5).to(dtype)


def state_of(model: nn.Module) -> tuple:
    """Return everything of a model that must not change, and the random states."""
    tensors = {k: (id(v), v._version, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    modules = [(n, id(m), m.training, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()]
    grads = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    return tensors, modules, grads, torch.get_rng_state(), random.getstate()


def assert_same_state(before: tuple, after: tuple) -> None:
    for key, (identity, version, value) in before[0].items():
        assert after[0][key][:2] == (identity, version), key
        torch.testing.assert_close(after[0][key][2], value, rtol=0, atol=0)
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert before[4] == after[4]


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


def untouched(transform, model: nn.Module, *args, **kwargs) -> tuple[nn.Module, repvgg.ExpandReport]:
    """Apply ``expand`` or ``insert_bn``, and check that the input is unchanged and shares nothing with the result."""
    before = state_of(model)
    out, report = transform(model, *args, **kwargs)
    assert_same_state(before, state_of(model))
    assert not storages(model) & storages(out)
    assert not set(model.modules()) & set(out.modules())
    return out, report


def assert_same_outputs(model: nn.Module, other: nn.Module, *images: Tensor, tolerance: float = 1e-10) -> None:
    """Check equality in eval mode, relative to the largest output."""
    with torch.no_grad():
        for x in images:
            expected, found = copy.deepcopy(model).eval()(x), copy.deepcopy(other).eval()(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
