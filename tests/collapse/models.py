"""Shared helpers: models with trained-looking statistics, and one check of every property of a collapse."""

import copy
import random
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import repvgg
from repvgg.errors import NothingFoldedWarning


def trained(model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return the model in eval mode with parameters and statistics far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None:
            part.running_mean.normal_(0, 0.5, generator=generator)
            part.running_var.uniform_(0.3, 2.5, generator=generator)
        if isinstance(part, _BatchNorm) and part.affine:
            part.weight.data.normal_(1, 0.4, generator=generator)
            part.bias.data.normal_(0, 0.4, generator=generator)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.to(dtype).eval()


def module(forward, **parts) -> nn.Module:
    """Return a module with the given parts and forward."""
    kind = type("Written", (nn.Module,), {"forward": forward})
    out = kind()
    for name, part in parts.items():
        setattr(out, name, part)
    return out


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kwargs.pop("padding", kernel // 2), **kwargs)


class Linear2d(nn.Module):
    """conv, BN."""

    def __init__(self, stride: int = 1, channels: int = 4):
        super().__init__()
        self.conv = conv(channels, channels, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.stride, self.tag = stride, 3

    def forward(self, x):
        return self.bn(self.conv(x))


class Block(Linear2d):
    """conv, BN, ReLU."""

    def __init__(self, inplace: bool = True, channels: int = 4):
        super().__init__(channels=channels)
        self.act = nn.ReLU(inplace)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Branches(nn.Module):
    """ReLU of two branches, and attributes that its forward never uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = Linear2d(), conv(kernel=1), nn.ReLU()
        self.width, self.unused, self.temperature = 4, nn.Linear(2, 2), nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return self.act(self.a(x) + self.b(x))


def image(channels: int = 4, height: int = 13, width: int = 18, *, seed: int = 1, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64).add(0.5).to(dtype)


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


def state_of(model: nn.Module) -> tuple:
    """Return everything of a model that a collapse must not change, as values."""
    tensors = {k: (id(v), v._version, v.detach().clone()) for k, v in _tensors(model)}
    flags = [(n, m.training, type(m), sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()]
    plain = [{k: copy.copy(v) for k, v in m.__dict__.items() if _is_data(v)} for m in model.modules()]
    grads = {k: (p.requires_grad, p.grad is None) for k, p in model.named_parameters()}
    return tensors, flags, plain, grads, torch.get_rng_state(), random.getstate()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        yield from ((f"{name}!{k}", v) for k, v in module.__dict__.items() if isinstance(v, Tensor))


def _is_data(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, list, dict, tuple)) and not _holds_tensor(value)


def _holds_tensor(value: object) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_holds_tensor, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def assert_same_state(before: tuple, after: tuple) -> None:
    assert before[0].keys() == after[0].keys()
    for key, (identity, version, value) in before[0].items():
        assert after[0][key][:2] == (identity, version), key
        torch.testing.assert_close(after[0][key][2], value, rtol=0, atol=0, equal_nan=True)
    assert before[1] == after[1]
    assert repr(before[2]) == repr(after[2])
    assert before[3] == after[3]
    assert torch.equal(before[4], after[4])
    assert before[5] == after[5]


def collapse(model: nn.Module) -> tuple[nn.Module, repvgg.Report]:
    """Call ``reparameterize`` with the checks that hold for every model; it may fold nothing."""
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        plain, report = repvgg.reparameterize(model)
        assert_same_state(before, state_of(model))
        assert not storages(model) & storages(plain)
        assert not {id(m) for m in model.modules()} & {id(m) for m in plain.modules()}
        again, second = repvgg.reparameterize(plain)
    assert second.folded == ()
    assert list(again.state_dict()) == list(plain.state_dict())
    paths = dict(plain.named_modules(remove_duplicate=False))
    for entry in report.folded:
        assert isinstance(paths[entry.name], nn.Conv2d), entry.name
    kept = {name for name, part in plain.named_modules() if isinstance(part, _BatchNorm)}
    assert kept <= {entry.name for entry in report.left}
    return plain, report


def assert_same_outputs(
    model: nn.Module, plain: nn.Module, *inputs: object, tolerance: float = 1e-11, **kwargs
) -> None:
    """Check that both return the same on copies of the inputs, twice in a row."""
    for _ in range(2):
        with torch.no_grad():
            expected = model(*copy.deepcopy(inputs), **kwargs)
            found = plain(*copy.deepcopy(inputs), **kwargs)
        ours, theirs = tree_leaves(found), tree_leaves(expected)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check(model: nn.Module, *inputs: object, **kwargs) -> tuple[nn.Module, repvgg.Report]:
    """Collapse the model and compare on images of two odd sizes."""
    plain, report = collapse(model)
    for given in (inputs, tuple(_larger(x) for x in inputs)):
        assert_same_outputs(model, plain, *given, **kwargs)
    return plain, report


def _larger(value: object) -> object:
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    h, w = value.shape[2:]
    return torch.cat([value, value.flip(2)], 2)[:, :, : h + 4].repeat(1, 1, 1, 2)[..., : w + 5]
