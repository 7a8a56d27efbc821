"""What layers receive and return on calibration images: histograms of inputs, means of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.errors import UsageError
from repvgg.quantization.ranges import Histogram

BATCH = 16  # images that run at once where all of them are not needed together


@final
@dataclass(eq=False)
class LayerStatistics:
    """A layer over the calibration images.

    Attributes:
        inputs: histogram of its input values.
        calls: how often it is called for a batch.
        elements_per_image: of its input and its output together.
        output_mean: (O,) float64, mean of each output channel over images and pixels.
    """

    inputs: Histogram = field(default_factory=Histogram)
    calls: int = 0
    elements_per_image: int = 0
    output_mean: Tensor | None = None
    _elements: int = 0

    def add_output(self, y: Tensor) -> None:
        """Include an output (N, O, H, W), or (N, …, O) of a linear layer, in the mean."""
        values = channels_last(y).reshape(-1, y.shape[1] if y.ndim == 4 else y.shape[-1]).double()
        total = self._elements + len(values)
        mean = torch.zeros(values.shape[1], dtype=torch.float64) if self.output_mean is None else self.output_mean
        self.output_mean = mean + (values.sum(0).cpu() - len(values) * mean) / total
        self._elements = total


def channels_last(y: Tensor) -> Tensor:
    """Return a feature map (N, C, H, W) as (N, H, W, C), and anything else as it is."""
    return y.movedim(1, -1) if y.ndim == 4 else y


def collect_statistics(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]
) -> Mapping[str, LayerStatistics]:
    """Run ``model`` over the calibration images twice, and return the statistics of the layers ``names``.

    They are in the order of execution; layers that were not called come last.

    Raises:
        UsageError: there are no images, or an activation is NaN or infinite.
    """
    if not batches or not sum(len(batch) for batch in batches):
        raise UsageError("Calibration needs images: give at least one batch.")
    found = {name: LayerStatistics() for name in names}

    order: dict[str, None] = {}

    def observe(name: str, x: Tensor, y: Tensor) -> None:
        order.setdefault(name)
        found[name].inputs.observe_range(x)
        found[name].calls += 1
        found[name].elements_per_image = max(found[name].elements_per_image, (x.numel() + y.numel()) // len(x))
        found[name].add_output(y)

    def count(name: str, x: Tensor, y: Tensor) -> None:
        found[name].inputs.count(x)

    for visit in (observe, count):
        with hooked(model, names, visit):
            for batch in batches:
                run(model, batch)
    for statistics in found.values():
        statistics.calls //= len(batches)
    return {name: found[name] for name in dict.fromkeys((*order, *names))}


@contextmanager
def hooked(model: nn.Module, names: Sequence[str], visit: Callable[[str, Tensor, Tensor], Any]) -> Iterator[None]:
    """Call ``visit(name, input, output)`` after each call of the layers; what it returns replaces the output."""
    handles = []
    for name in names:

        def hook(_: nn.Module, args: tuple[Any, ...], y: Any, name: str = name) -> Any:
            return visit(name, args[0], y)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, images: Tensor) -> Any:
    """Run ``model`` in eval mode, without gradients."""
    with eval_mode(model), torch.no_grad():
        return model(images)


def run_in_batches(model: nn.Module, images: Tensor) -> Tensor:
    """Return the output of ``model``, or the first one of several, for more images than fit into memory at once."""
    return torch.cat([first_tensor(run(model, batch)) for batch in torch.split(images, BATCH)])


def first_tensor(output: Any) -> Tensor:
    """Return the output to compare: a tensor, or the first one of several.

    Raises:
        UsageError: there is none.
    """
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()))
        elif isinstance(output, Sequence) and output:
            output = output[0]
        else:
            raise UsageError(f"The network returns {type(output).__name__}: there is no tensor to compare.")
    return output
