"""Backbones of segmentation models, and PSPNets built on them from a specification."""

from __future__ import annotations

from torch import Tensor, nn

from repvgg.errors import UsageError
from repvgg.models.dilation import dilate_
from repvgg.models.pspnet import PSPNet
from repvgg.models.registry import RESNETS, SPECS
from repvgg.models.repvgg import RepVGGBackbone
from repvgg.models.sources import build_torchvision
from repvgg.models.spec import PSPNetSpec

_RESNET_STEM_STRIDE = 4  # of the 7x7 convolution and the max pool


class ResNetBackbone(nn.Module):
    """A ResNet of torchvision without its classifier; tensors keep torchvision's names.

    Args:
        name: of the model in torchvision, such as "resnet50".
        plain: build the form without batch norms, with a bias in each convolution.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """

    def __init__(self, name: str, plain: bool = False) -> None:
        super().__init__()
        self.conv1: nn.Module
        self.bn1: nn.Module
        self.relu: nn.Module
        self.maxpool: nn.Module
        resnet = build_torchvision(name, num_classes=1).model
        for part, module in list(resnet.named_children()):
            if part not in ("avgpool", "fc"):
                self.add_module(part, module)
        if plain:
            _remove_batch_norms(self)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps that :meth:`features` returns."""
        stem = self.conv1
        assert isinstance(stem, nn.Conv2d)
        # In each bottleneck the widest convolution is the last one.
        return (stem.out_channels, *(max(_widths(stage)) for stage in self._stages))

    @property
    def _stages(self) -> tuple[nn.Module, ...]:
        return tuple(self.get_submodule(f"layer{index}") for index in (1, 2, 3, 4))

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the maps after the first convolution and after each stage: strides 2, 4, 8, 16, 32 before dilation."""
        maps: list[Tensor] = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(maps[0])
        for stage in self._stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.features(x)


def _widths(module: nn.Module) -> list[int]:
    return [part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)]


def _remove_batch_norms(module: nn.Module) -> None:
    """Give each convolution the bias that its batch norm becomes, in place; a sequence of the two becomes one layer."""
    conv: nn.Conv2d | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            conv = child
        elif isinstance(child, nn.BatchNorm2d) and conv is not None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
            module.set_submodule(name, nn.Identity())
        else:
            _remove_batch_norms(child)
            if name == "downsample":
                module.set_submodule(name, child.get_submodule("0"))


def build_pspnet(spec: PSPNetSpec, num_classes: int, in_channels: int = 3, plain: bool = False) -> PSPNet:
    """Build a PSPNet, newly initialized, in training mode.

    Args:
        spec: the sizes, the name of the backbone and how it is dilated.
        num_classes: number of logits of a pixel, at least 1.
        in_channels: channels of the images; a ResNet takes 3.
        plain: build the plain form, with the names and shapes that a collapse of the train form leaves.

    Raises:
        UsageError: there is no such backbone, it cannot be dilated to the output stride, or a count does not fit.
        MissingDependencyError: a ResNet needs torchvision.
    """
    backbone: nn.Module
    if spec.backbone in SPECS:
        backbone = RepVGGBackbone(SPECS[spec.backbone], in_channels, plain)
        dilate_(list(backbone.stages), backbone.spec.stem.stride, spec.output_stride, spec.dilation)
    elif spec.backbone in RESNETS:
        if in_channels != 3:
            raise UsageError(f"{spec.backbone} takes images of 3 channels, not {in_channels}.")
        backbone = ResNetBackbone(spec.backbone, plain)
        stages = [backbone.get_submodule(f"layer{index}") for index in (1, 2, 3, 4)]
        dilate_(stages, _RESNET_STEM_STRIDE, spec.output_stride, spec.dilation)
    else:
        raise UsageError(f"There is no backbone {spec.backbone!r}: take a RepVGG or one of {', '.join(RESNETS)}.")
    return PSPNet(spec, backbone, num_classes, plain)
