"""Channel statistics over data, and how to set them in a batch norm without changing its function in eval mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg.errors import UsageError
from repvgg.expansion.sites import Site
from repvgg.symbolic import algebra_device, first_float
from repvgg.verify import isolated_eval

Data = Tensor | Iterable[Any]


class ChannelStatistics:
    """Mean and variance of each channel over all pixels of all batches, with equal weights, in float64.

    Batches are merged by ``M2 = M2a + M2b + δ²·na·nb/n`` with δ the difference of their means (Chan, Golub and LeVeque,
    1979); the variance is the biased one, M2 / n, by which a batch norm in training mode divides.

    Attributes:
        batches: number of batches.
        count: number of pixels.
        mean_C: shape (C,).
    """

    def __init__(self) -> None:
        self.batches = 0
        self.count = 0
        self.mean_C = torch.zeros(())
        self.squares_C = torch.zeros(())

    @property
    def variance(self) -> Tensor:
        """The biased variance, shape (C,)."""
        return self.squares_C / self.count

    def add(self, x_NCHW: Tensor) -> None:
        """Add the pixels of one batch."""
        number = x_NCHW.numel() // max(1, x_NCHW.shape[1])
        if not number:
            return
        # In float32 the sums over millions of pixels would lose digits.
        x_NCHW = x_NCHW.to(algebra_device(x_NCHW)).double()
        var_C, mean_C = torch.var_mean(x_NCHW, (0, *range(2, x_NCHW.dim())), correction=0)
        delta_C = mean_C - self.mean_C.to(mean_C)
        total = self.count + number
        between_C = delta_C.square() * (self.count * number / total)
        self.squares_C = self.squares_C.to(mean_C) + var_C * number + between_C
        self.mean_C = self.mean_C.to(mean_C) + delta_C * (number / total)
        self.batches, self.count = self.batches + 1, total


def run_on(model: nn.Module, data: Data) -> None:
    """Run a model of one tensor in eval mode on every batch, and restore its modes.

    ``data`` is a batch (N, C, H, W), or an iterable of batches; of a batch that is a tuple or list, such as images and
    labels, the first entry is used. It is moved to the model's device, and images to its dtype. Raises UsageError if
    there is no batch, or one is not a tensor.
    """
    like = first_float(model)
    empty = True
    with isolated_eval(model):
        for batch in [data] if isinstance(data, Tensor) else data:
            model(_prepared(batch, like))
            empty = False
    if empty:
        raise UsageError("There is no data to compute statistics of: pass one or several batches of inputs.")


def _prepared(batch: Any, like: Tensor | None) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise UsageError(f"Each batch of data must be a tensor, or start with one, not a {type(images).__name__}.")
    if like is None:
        return images
    return images.to(device=like.device, dtype=like.dtype if images.is_floating_point() else images.dtype)


@contextmanager
def observe_inputs(modules: Iterable[nn.Module], observe: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``observe`` with each of the modules and its input whenever it runs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(module, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def input_statistics(model: nn.Module, norms: Iterable[_BatchNorm], data: Data) -> dict[nn.Module, ChannelStatistics]:
    """Return statistics of the input of each batch norm while ``model`` runs in eval mode on ``data``."""
    found: dict[nn.Module, ChannelStatistics] = {norm: ChannelStatistics() for norm in norms}
    with observe_inputs(found, lambda norm, x: found[norm].add(x)):
        run_on(model, data)
    return found


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose γ and β can compensate other statistics."""
    return isinstance(module, _BatchNorm) and module.affine and module.running_var is not None


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) of a batch norm in eval mode, in float64: ``y = scale · x + shift``."""
    scale_C = _to_float64(norm.weight) / (_to_float64(norm.running_var) + norm.eps).sqrt()
    return scale_C, _to_float64(norm.bias) - _to_float64(norm.running_mean) * scale_C


def _to_float64(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # see has_statistics
    return tensor.to(algebra_device(tensor)).double()


def set_statistics(norm: _BatchNorm, statistics: ChannelStatistics, scale_C: Tensor, shift_C: Tensor) -> bool:
    """Set the statistics of a batch norm, and make it compute ``scale · x + shift`` in eval mode.

    ``μ`` and ``σ²`` become the running statistics, ``γ = scale · √(σ² + ε)`` and ``β = shift + scale · μ``. With scale
    1 and shift 0 it is the identity in eval mode, and in training mode too on a batch with these statistics.
    Returns False, with the batch norm unchanged, if there are no statistics or the numbers do not fit its dtype.
    """
    if not statistics.count:
        return False
    # Rounded first, so that γ and β compensate the statistics as they are stored.
    mean_C, var_C = (value.to(norm.weight) for value in (statistics.mean_C, statistics.variance))
    scale_C, shift_C = (_to_float64(value.to(var_C.device)) for value in (scale_C, shift_C))
    weight_C = (scale_C * (_to_float64(var_C) + norm.eps).sqrt()).to(norm.weight)
    bias_C = (shift_C + scale_C * _to_float64(mean_C)).to(norm.weight)
    if not all(bool(value.isfinite().all()) for value in (mean_C, var_C, weight_C, bias_C)):
        return False
    values = {"running_mean": mean_C, "running_var": var_C, "weight": weight_C, "bias": bias_C}
    for name, value in values.items():
        getattr(norm, name).copy_(value)
    # With momentum=None, the counter is the weight of these statistics in the next update.
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked += statistics.batches
    return True


class OutputStatistics:
    """Statistics of the output of one convolution, and whether a batch norm reads it."""

    def __init__(self) -> None:
        self.statistics = ChannelStatistics()
        self.last: weakref.ref[Any] | None = None  # weak, or every feature map would stay in memory
        self.followed = False
        self.is_image = True

    def add(self, y_NCHW: Any) -> None:
        """Add one output."""
        self.is_image = self.is_image and isinstance(y_NCHW, Tensor) and y_NCHW.dim() == 4
        if self.is_image:
            self.statistics.add(y_NCHW)
            self.last = weakref.ref(y_NCHW)

    def check_followed(self, x: Any) -> None:
        """Note that ``x``, the input of a batch norm, is the last output itself."""
        # By identity: a batch norm that reads a sum or an activation does not follow the convolution.
        self.followed = self.followed or (self.last is not None and self.last() is x)

    @property
    def refusal(self) -> str | None:
        """Why no batch norm can be inserted, or None."""
        if self.followed:
            return "a batch norm follows it already"
        if not self.is_image:
            return "its output is not images (N, C, H, W)"
        return None if self.statistics.count else "the data never reaches it"


def output_statistics(model: nn.Module, sites: Iterable[Site], data: Data) -> dict[Site, OutputStatistics]:
    """Return statistics of the outputs of convolutions while ``model`` runs on ``data`` in eval mode."""
    found = {site: OutputStatistics() for site in sites}
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]

    def check_all(_: nn.Module, x: Tensor) -> None:
        for outputs in found.values():
            outputs.check_followed(x)

    with ExitStack() as stack:
        for site, outputs in found.items():
            hook = site.conv.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.add(y))
            stack.callback(hook.remove)
        stack.enter_context(observe_inputs(norms, check_all))
        run_on(model, data)
    return found
