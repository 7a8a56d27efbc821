"""RepVGG of its authors and of mmpretrain: names, tensors and forward, re-implemented from their descriptions.

Independent of the library: its reading of these files is compared with this.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Net:
    """Depths and widths of the stages, strides of their first blocks, and the contents of a block."""

    depths: tuple
    widths: tuple
    stem: int
    strides: tuple = (2, 2, 2, 2, 2)  # the stem first
    groups: int = 1
    reduction: int = 0
    classes: int = 7
    channels: int = 3


SMALL = Net((2, 2, 3, 1), (8, 12, 16, 20), 8, groups=2)
GATED = Net((2, 1, 2, 1), (16, 32, 32, 48), 16, reduction=4)
PLUS = Net((2, 1, 2, 2, 1), (8, 12, 16, 16, 24), 8, strides=(2, 2, 2, 2, 1, 2), reduction=4)
A0 = Net((2, 4, 14, 1), (48, 96, 192, 1280), 48, classes=1000)


def upstream_place(stage, block):
    return "stage0" if stage == 0 else f"stage{stage}.{block}"


def plus_place(stage, block):
    stages = ["stage0", "stage1", "stage2", "stage3_first", "stage3_second", "stage4"]
    return "stage0" if stage == 0 else f"{stages[stage]}.blocks.{block}"


def mmpretrain_place(stage, block):
    return "backbone.stem" if stage == 0 else f"backbone.stage_{stage}.{block}"


@dataclass(frozen=True)
class Names:
    place: object
    dense: str
    pointwise: str
    norm: str
    identity: str
    plain: str
    down: str
    up: str
    head: str
    gate_last: bool = False


UPSTREAM_NAMES = Names(
    upstream_place, "rbr_dense", "rbr_1x1", "bn", "rbr_identity", "rbr_reparam", "se.down", "se.up", "linear"
)
PLUS_NAMES = Names(
    plus_place,
    *("rbr_dense", "rbr_1x1", "bn", "rbr_identity", "rbr_reparam", "post_se.down", "post_se.up", "linear"),
    gate_last=True,
)
MMPRETRAIN_NAMES = Names(
    mmpretrain_place,
    *("branch_3x3", "branch_1x1", "norm", "branch_norm", "branch_reparam"),
    *("se_layer.conv1.conv", "se_layer.conv2.conv", "head.fc"),
)


def blocks(net):
    """Yield (stage, block, inputs, outputs, stride, groups) of each block, stem first."""
    inputs, layer = net.channels, 0
    for stage, (depth, width) in enumerate(zip((1, *net.depths), (net.stem, *net.widths), strict=True)):
        for block in range(depth):
            stride = net.strides[stage] if block == 0 else 1
            groups = net.groups if layer in range(2, 100, 2) else 1
            yield stage, block, inputs, width, stride, groups
            inputs, layer = width, layer + 1


class Tensors(dict):
    """A state dict with methods that add random tensors."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def draw(self, *shape, low=-0.4, high=0.4):
        return torch.empty(shape).uniform_(low, high, generator=self.generator)

    def norm(self, name, channels):
        self[f"{name}.weight"] = self.draw(channels, low=0.5, high=1.5)
        self[f"{name}.bias"] = self.draw(channels)
        self[f"{name}.running_mean"] = self.draw(channels)
        self[f"{name}.running_var"] = self.draw(channels, low=0.5, high=2.0)
        self[f"{name}.num_batches_tracked"] = torch.tensor(17)

    def affine(self, name, *shape):
        self[f"{name}.weight"], self[f"{name}.bias"] = self.draw(*shape), self.draw(shape[0])


def state_dict(net, names, plain=False):
    tensors = Tensors()
    for stage, block, inputs, outputs, stride, groups in blocks(net):
        at = names.place(stage, block)
        if plain:
            tensors.affine(f"{at}.{names.plain}", outputs, inputs // groups, 3, 3)
        else:
            if inputs == outputs and stride == 1:
                tensors.norm(f"{at}.{names.identity}", outputs)
            for branch, size in ((names.dense, 3), (names.pointwise, 1)):
                tensors[f"{at}.{branch}.conv.weight"] = tensors.draw(outputs, inputs // groups, size, size)
                tensors.norm(f"{at}.{branch}.{names.norm}", outputs)
        if net.reduction:
            tensors.affine(f"{at}.{names.down}", outputs // net.reduction, outputs, 1, 1)
            tensors.affine(f"{at}.{names.up}", outputs, outputs // net.reduction, 1, 1)
    tensors.affine(names.head, net.classes, net.widths[-1])
    if names is PLUS_NAMES and not plain:
        for name, width in zip(("stage1", "stage2", "stage3_first"), net.widths, strict=False):
            tensors[f"{name}_aux.0.conv.weight"] = tensors.draw(width, width, 3, 3)
            tensors.norm(f"{name}_aux.0.bn", width)
            tensors.affine(f"{name}_aux.3", net.classes, width)
    return dict(tensors)


def logits(net, names, tensors, x):
    """Return the logits of the train form or of the plain form, depending on the tensors."""

    def norm(name, y):
        mean, var, weight, bias = (
            tensors[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(y, mean, var, weight, bias, eps=1e-5)

    def gate(at, y):
        y_1x1 = y.mean((2, 3), keepdim=True)
        hidden = F.conv2d(y_1x1, tensors[f"{at}.{names.down}.weight"], tensors[f"{at}.{names.down}.bias"]).relu()
        return y * F.conv2d(hidden, tensors[f"{at}.{names.up}.weight"], tensors[f"{at}.{names.up}.bias"]).sigmoid()

    for stage, block, inputs, outputs, stride, groups in blocks(net):
        at = names.place(stage, block)
        if f"{at}.{names.plain}.weight" in tensors:
            weight, bias = tensors[f"{at}.{names.plain}.weight"], tensors[f"{at}.{names.plain}.bias"]
            y = F.conv2d(x, weight, bias, stride, 1, groups=groups)
        else:
            dense = F.conv2d(x, tensors[f"{at}.{names.dense}.conv.weight"], None, stride, 1, groups=groups)
            pointwise = F.conv2d(x, tensors[f"{at}.{names.pointwise}.conv.weight"], None, stride, groups=groups)
            y = norm(f"{at}.{names.dense}.{names.norm}", dense) + norm(
                f"{at}.{names.pointwise}.{names.norm}", pointwise
            )
            if inputs == outputs and stride == 1:
                y = y + norm(f"{at}.{names.identity}", x)
        if net.reduction and not names.gate_last:
            y = gate(at, y)
        x = y.relu()
        if net.reduction and names.gate_last:
            x = gate(at, x)
    return F.linear(x.mean((2, 3)), tensors[f"{names.head}.weight"], tensors[f"{names.head}.bias"])
