"""Dilated layers as undilated ones on phase images: the same function, on kernels that runtimes are fast at."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repvgg._arguments import check_model
from repvgg.errors import TrainingModeError, first_line

# Odd and even sides, of which neither is a multiple of a usual dilation, and fewer pixels than phases.
_TEST_SIZES = ((13, 10), (3, 9))
_TOLERANCE = 1e-10  # relative, in float64


@dataclass(frozen=True)
class PhaseReport:
    """What :func:`dilate_by_phases` did.

    Attributes:
        runs: first and last path, number of layers and dilation of each run of layers, as one text.
        skipped: path of a module with dilated convolutions → why it stays as it is.
    """

    runs: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.runs)} runs of dilated layers on phase images", *(f"  {run}" for run in self.runs)]
        return "\n".join(lines + [f"  {path}: stays, because {reason}" for path, reason in self.skipped.items()])


class PhaseImages(nn.Sequential):
    """Run layers of dilation d, given as layers of dilation 1, on the d² phase images of a feature map (N, C, H, W).

    Phase (i, j) has the pixels ``x[:, :, i::d, j::d]``. A convolution of dilation d never mixes phases, and its zero
    padding of ``d (k - 1) / 2`` pixels is ``(k - 1) / 2`` pixels of every phase. So the phases are images of a larger
    batch for an ordinary convolution. Where d does not divide a side, phases have two sizes, and each size is a batch
    of its own: padding them to one size would be wrong from the second layer on, whose input is not zero there.
    """

    def __init__(self, layers: Sequence[nn.Module], dilation: int) -> None:
        super().__init__(*layers)
        self.dilation = dilation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.Sequential uses
        d, (batch, channels, height, width) = self.dilation, input.shape
        rows, columns = -(-height // d), -(-width // d)
        x = F.pad(input, (0, columns * d - width, 0, rows * d - height))
        # (N, C, rows, d, columns, d) → (d, d, N, C, rows, columns): phases first.
        phases = x.reshape(batch, channels, rows, d, columns, d).permute(3, 5, 0, 1, 2, 4)
        bands = [
            torch.cat([self._run(phases, i, j, rows, columns) for j in _bands(width, d)], 1) for i in _bands(height, d)
        ]
        y = torch.cat(bands, 0).permute(2, 3, 4, 0, 5, 1)
        return y.reshape(batch, y.shape[1], rows * d, columns * d)[:, :, :height, :width]

    def _run(self, phases: Tensor, i: tuple[int, int, int], j: tuple[int, int, int], rows: int, columns: int) -> Tensor:
        """Run the phases of one size; the result is padded to the size of the largest phases."""
        (top, bottom, height), (left, right, width) = i, j
        x = phases[top:bottom, left:right, :, :, :height, :width]
        y: Tensor = super().forward(x.reshape(-1, *x.shape[3:]))  # type: ignore[no-untyped-call]
        y = F.pad(y, (0, columns - width, 0, rows - height))
        return y.reshape(bottom - top, right - left, phases.shape[2], *y.shape[1:])


def _bands(size: int, d: int) -> list[tuple[int, int, int]]:
    """Return the ranges of phases that have the same number of pixels of a side, as (first, last + 1, pixels)."""
    if size < d:
        return [(0, d, 1)]  # phases without a pixel have one of padding, which is cut off in the end
    longer = size % d
    return [band for band in ((0, longer, size // d + 1), (longer, d, size // d)) if band[0] < band[1]]


def dilate_by_phases(model: nn.Module) -> tuple[nn.Module, PhaseReport]:
    """Replace runs of dilated layers in sequences by :class:`PhaseImages`; the result computes the same function.

    A run is a stretch of children of an ``nn.Sequential`` whose convolutions all have the same dilation d > 1, stride 1
    and zero padding that keeps the size; 1x1 convolutions and activations fit any dilation. Each child is compared with
    its form on phases in float64, on sizes that d does not divide, before it is replaced. Dilated kernels are slow in
    most runtimes, and Winograd kernels exist for undilated ones only (the reason for the paper's "-fast" models, §4.3).

    Args:
        model: in eval mode, without batch norms in the dilated layers: the plain form. It is not changed.

    Returns:
        A new model and a report of the runs, and of the dilated modules that stay as they are.

    Raises:
        TrainingModeError: the model is in training mode.
    """
    check_model(model, "dilate_by_phases")
    if model.training:
        raise TrainingModeError("dilate_by_phases converts a model for inference: call model.eval() first.")
    result = copy.deepcopy(model)
    runs: list[str] = []
    reasons: dict[str, str] = {}
    for path, sequence in list(result.named_modules()):
        # A sequence inside a layer that was replaced is no longer there.
        current = dict(result.named_modules()).get(path)
        # Not subclasses, which may have a forward of their own.
        if isinstance(current, nn.Sequential) and type(current) is nn.Sequential and current is sequence:
            _replace_runs(path, current, runs, reasons)
    skipped: dict[str, str] = {}
    for path, module in result.named_modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            layer = max((one for one in reasons if f"{path}.".startswith(f"{one}.")), key=len, default=path)
            skipped[layer] = reasons.get(layer, "it is in no nn.Sequential")
    return result, PhaseReport(tuple(runs), skipped)


def _replace_runs(path: str, sequence: nn.Sequential, runs: list[str], reasons: dict[str, str]) -> None:
    children = list(sequence.named_children())
    found: list[tuple[int, list[str]]] = []  # dilation and names of the children of each run
    for name, child in children:
        dilations = {conv.dilation for conv in _kernels(child)} - {(1, 1)}
        d = next(iter(dilations))[0] if len(dilations) == 1 else 0
        if not dilations:
            continue
        where = f"{path}.{name}" if path else name
        if reason := _why_not(child, d, dilations):
            reasons[where] = reason
            continue
        index = [one for one, _ in children].index(name)
        if found and found[-1][0] == d and found[-1][1][-1] == children[index - 1][0]:
            found[-1][1].append(name)
        else:
            found.append((d, [name]))
    for d, names in found:
        layers = [_undilated(sequence.get_submodule(name)) for name in names]
        first, last = names[0], names[-1]
        sequence.set_submodule(first, PhaseImages(layers, d))
        for name in names[1:]:
            sequence.set_submodule(name, nn.Identity())
        prefix = f"{path}." if path else ""
        runs.append(f"{prefix}{first} to {prefix}{last}: {len(names)} layers of dilation {d}")


def _why_not(child: nn.Module, d: int, dilations: set[tuple[int, ...]]) -> str:
    """Return why a child cannot run on phase images, or an empty string."""
    if len(dilations) > 1 or any(pair != (d, d) for pair in dilations):
        return f"its convolutions have several dilations, {', '.join(map(str, sorted(dilations)))}"
    for conv in _kernels(child):
        same = tuple(d * (size - 1) // 2 for size in conv.kernel_size)
        if conv.dilation == (1, 1):
            return "it has an undilated kernel as well"
        if conv.stride != (1, 1) or conv.padding != same or conv.padding_mode != "zeros":
            return "it does not keep the size of the map with zero padding"
    norms = [module for module in child.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    if norms:
        return "it has a batch norm: call repvgg.reparameterize first"
    phased, reference = PhaseImages([_undilated(child).double()], d), copy.deepcopy(child).double()
    channels = next(conv.in_channels for conv in child.modules() if isinstance(conv, nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    for size in _TEST_SIZES:
        x = torch.randn(1, channels, *size, dtype=torch.float64, generator=generator)
        try:
            with torch.no_grad():
                expected, found = reference(x), phased(x)
        except Exception as error:  # a forward of the user's
            return f"it cannot be run on its own ({first_line(error)})"
        if (expected - found).abs().max() > _TOLERANCE * expected.abs().max():
            return "pixels of different phases depend on each other in it, or it is random"
    return ""


def _kernels(module: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions larger than 1x1."""
    convs = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    return [conv for conv in convs if conv.kernel_size != (1, 1)]


def _undilated(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for conv in _kernels(module):
        conv.dilation = (1, 1)
        conv.padding = tuple((size - 1) // 2 for size in conv.kernel_size)
    return module
