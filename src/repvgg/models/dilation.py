"""Dilation in place of stride: feature maps of a higher resolution from the weights of a classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from torch import nn

from repvgg.errors import UsageError

DilationRule: TypeAlias = Literal["paper", "exact", "fast"]

_FAST_BLOCKS = 4  # the paper's §4.3: "the last 4 layers of stage 4", and the one of stage 5


def dilate_(stages: Sequence[nn.Module], stride: int, output_stride: int, rule: DilationRule = "paper") -> None:
    """Replace the strides beyond ``output_stride`` by dilation, in place.

    A stage of stride s whose output would be coarser than ``output_stride`` runs at stride 1, and s multiplies the
    dilation d of its k x k convolutions, whose padding becomes ``d (k - 1) / 2``. 1x1 convolutions only lose their
    stride. No tensor changes its name or shape, so weights of the strided network load.

    The rules differ in which convolutions get the new dilation:

    - ``"paper"``: every k x k convolution of the stage, as RepVGG's §4.3 and its authors' code. With the weights of a
      classifier this is another function: its first convolution in each such stage was trained on the finer grid.
    - ``"exact"``: all but those up to the one that had the stride, which keep the dilation of the stage before. On
      every s-th pixel the result equals that of the strided network, up to the border. It is what torchvision and timm
      do for ResNets.
    - ``"fast"``: as "paper", but in the first dilated stage only the last 4 blocks are dilated (RepVGG's §4.3, the
      "-fast" models: five dilated layers together).

    Args:
        stages: modules that run one after the other, each of them a sequence of blocks.
        stride: input pixels per pixel of the first stage's input.
        output_stride: the largest stride that the result may have.
        rule: see above.

    Raises:
        UsageError: the strides do not reach ``output_stride``, a stage has a pool with a stride, or a convolution has
            a padding other than ``(k - 1) / 2`` or is dilated already.
    """
    dilation, is_first = 1, True
    for stage in stages:
        stage_stride = max(conv.stride[0] for conv in _convolutions(stage))
        if stride * stage_stride <= output_stride:
            stride *= stage_stride
            continue
        previous, dilation = dilation, dilation * stage_stride
        if rule == "fast" and is_first:
            blocks = list(stage.children())
            _replace_strides(blocks[:-_FAST_BLOCKS], previous, previous, "paper")
            _replace_strides(blocks[-_FAST_BLOCKS:], previous, dilation, "paper")
        else:
            _replace_strides([stage], previous, dilation, rule)
        is_first = False
    if stride != output_stride:
        raise UsageError(f"The strides of this network reach {stride}, not the output stride of {output_stride}.")


def _replace_strides(modules: Sequence[nn.Module], previous: int, dilation: int, rule: DilationRule) -> None:
    convs = [conv for module in modules for conv in _convolutions(module)]
    # Branches of a block are parallel: what is registered before the last strided kernel reads the finer grid as well.
    strided = [index for index, conv in enumerate(convs) if conv.stride != (1, 1) and conv.kernel_size != (1, 1)]
    first_on_new_grid = max(strided, default=-1) + 1 if rule == "exact" else 0
    for index, conv in enumerate(convs):
        conv.stride = (1, 1)
        if conv.kernel_size != (1, 1):
            _dilate(conv, dilation if index >= first_on_new_grid else previous)


def _dilate(conv: nn.Conv2d, dilation: int) -> None:
    same = tuple((size - 1) // 2 for size in conv.kernel_size)
    if conv.padding != same or conv.dilation != (1, 1) or any(size % 2 == 0 for size in conv.kernel_size):
        raise UsageError(f"Only an undilated convolution with padding (k - 1) / 2 can be dilated, not {conv}.")
    conv.dilation = (dilation, dilation)
    conv.padding = tuple(dilation * side for side in same)


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d]:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            yield part
        elif isinstance(part, nn.MaxPool2d | nn.AvgPool2d) and part.stride not in (1, (1, 1)):
            raise UsageError(f"The stride of {part} cannot become a dilation: only convolutions can be dilated.")
