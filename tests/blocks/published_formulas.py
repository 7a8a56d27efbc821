"""A second derivation of each block's kernel: the published formula, written out on the block's parameters.

Each function returns kernel (O, I, K, K) and bias (O,) as of a convolution without groups. Nothing here is traced.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def factor(norm):
    """t = γ/σ."""
    return norm.weight / torch.sqrt(norm.running_var + norm.eps)


def norm_of(norm, kernel, bias=0.0):
    """Fold a batch norm into the convolution before it (RepVGG, Eq. 3)."""
    t = factor(norm)
    return kernel * t.view(-1, 1, 1, 1), (bias - norm.running_mean) * t + norm.bias


def ungrouped(weight, groups):
    """Write a grouped kernel (O, I/g, K, K) as one without groups (O, I, K, K)."""
    outputs = weight.shape[0] // groups
    blocks = weight.split(outputs)
    dense = weight.new_zeros(weight.shape[0], weight.shape[1] * groups, *weight.shape[2:])
    for group, block in enumerate(blocks):
        dense[group * outputs : (group + 1) * outputs, group * weight.shape[1] : (group + 1) * weight.shape[1]] = block
    return dense


def padded(kernel, size):
    """Centre a small kernel in a larger one."""
    y, x = ((large - small) // 2 for large, small in zip(size, kernel.shape[2:], strict=True))
    return F.pad(kernel, (x, x, y, y))


def dilated(kernel, rate):
    """Insert rate − 1 zeros between taps."""
    size = [rate * (side - 1) + 1 for side in kernel.shape[2:]]
    out = kernel.new_zeros(*kernel.shape[:2], *size)
    out[:, :, ::rate, ::rate] = kernel
    return out


def eye(channels, size):
    out = torch.zeros(channels, channels, *size, dtype=torch.float64)
    for channel in range(channels):
        out[channel, channel, size[0] // 2, size[1] // 2] = 1
    return out


def dirac(geometry):
    """Return the identity kernel without groups: output o of each group copies its input o."""
    inputs, outputs = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    out = torch.zeros(geometry.out_channels, geometry.in_channels, *geometry.kernel_size, dtype=torch.float64)
    for group in range(geometry.groups):
        for o in range(min(inputs, outputs)):
            out[group * outputs + o, group * inputs + o, geometry.kernel_size[0] // 2, geometry.kernel_size[1] // 2] = 1
    return out


def conv(module, geometry):
    return padded(ungrouped(module.weight, geometry.groups), geometry.kernel_size)


def conv_bn(block, geometry):
    return norm_of(block.bn, conv(block.conv, geometry))


def sum_of_branches(*, normed=("dense", "pointwise", "identity"), mean=False, after=False):
    """RepVGG and its variants: Σ_j BN(W_j) + BN(W1) + BN(I), each norm where configured, and one after the sum."""

    def published(block, geometry):
        branches = dict((block.sum if after else block).named_children())
        kernel, bias = torch.zeros_like(dirac(geometry)), torch.zeros(geometry.out_channels, dtype=torch.float64)
        for name, branch in branches.items():
            kind = name.rstrip("0123456789")
            if kind == "mean":
                assert mean
                k, b = eye(geometry.in_channels, (1, 1)).expand_as(kernel) / geometry.taps, 0
            elif kind == "identity":
                unit = eye(geometry.in_channels, geometry.kernel_size)
                k, b = norm_of(branch, unit) if kind in normed else (unit, 0)
            else:
                has = kind in normed
                k, b = conv_bn(branch, geometry) if has else (conv(branch, geometry), 0)
            kernel, bias = kernel + k, bias + b
        return norm_of(block.bn, kernel, bias) if after else (kernel, bias)

    return published


def sum_of_conv_bn(block, geometry):
    kernels, biases = zip(*(conv_bn(branch, geometry) for branch in block.children()), strict=True)
    return sum(kernels), sum(biases)


def dirac_net(block, geometry):
    layer, norm = block
    filters = []
    for o, weight in enumerate(layer.weight):
        filters.append(layer.beta[o] * weight / weight.square().sum().sqrt())
    identity = layer.alpha.view(-1, 1, 1, 1) * dirac(geometry)
    return norm_of(norm, identity + ungrouped(torch.stack(filters), geometry.groups))


def trivial(block, geometry):
    return norm_of(block[1], dirac(geometry) + ungrouped(block[0].weight, geometry.groups))


def compose_1x1_then_kxk(first, bias, second):
    """1x1 then kxk (DBB, Transform III): K[o, i] = Σ_d K2[o, d]·K1[d, i], b[o] = Σ_d b1[d]·ΣK2[o, d]."""
    kernel = torch.einsum("odyx,di->oiyx", second, first[:, :, 0, 0])
    return kernel, second.sum((2, 3)) @ bias


def dbb(block, geometry):
    kernel, bias = norm_of(block["dense"].bn, conv(block["dense"].conv, geometry))
    if "pointwise" in block:
        k, b = conv_bn(block["pointwise"], geometry)
        kernel, bias = kernel + k, bias + b
    first, inner, second, outer = block["expanded"]
    depthwise = geometry.groups == geometry.in_channels
    weight = ungrouped(first.weight, geometry.groups)
    weight = weight if depthwise else weight + eye(geometry.in_channels, (1, 1))
    k, b = compose_1x1_then_kxk(*norm_of(inner, weight), ungrouped(second.weight, geometry.groups))
    k, b = norm_of(outer, k, b)
    kernel, bias = kernel + k, bias + b
    mean = eye(geometry.out_channels, (1, 1)).expand(-1, -1, *geometry.kernel_size) / geometry.taps
    if len(block["mean"]) == 2:
        k, b = norm_of(block["mean"][1], mean)
    else:
        first, inner, _, outer = block["mean"]
        k, b = compose_1x1_then_kxk(*norm_of(inner, ungrouped(first.weight, geometry.groups)), mean)
        k, b = norm_of(outer, k, b)
    return kernel + k, bias + b


def doconv(block, geometry):
    """Compute every kernel element separately."""
    layer, norm = block
    flat = layer.weight.flatten(2)
    kernel = torch.zeros_like(flat)
    inputs, outputs = flat.shape[1], flat.shape[0] // geometry.groups
    for o in range(flat.shape[0]):
        for i in range(inputs):
            mixing = torch.eye(geometry.taps, dtype=torch.float64) + layer.depthwise[o // outputs * inputs + i]
            kernel[o, i] = mixing @ flat[o, i]
    return norm_of(norm, ungrouped(kernel.view_as(layer.weight), geometry.groups))


def expand_layers(block, geometry):
    (first, middle, last), norm = block
    f, m, n = (ungrouped(part.weight, geometry.groups) for part in (first, middle, last))
    return norm_of(norm, torch.einsum("on,nmyx,mi->oiyx", n[:, :, 0, 0], m, f[:, :, 0, 0]))


def expand_kernel(block, geometry):
    """Kernels of consecutive layers convolve, like the coefficients of polynomials in two variables."""
    layers, norm = block
    kernel = None
    for layer in layers:
        weight = ungrouped(layer.weight, geometry.groups)
        if kernel is None:
            kernel = weight
        else:
            kernel = F.conv2d(kernel.transpose(0, 1), weight.flip(2, 3), padding=2).transpose(0, 1)
    return norm_of(norm, kernel)


def replk(block, geometry):
    return sum_of_conv_bn(block, geometry)


def unireplk(block, geometry):
    kernel, bias = conv_bn(block["dense"], geometry)
    for name, branch in block.items():
        if name != "dense":
            weight = dilated(ungrouped(branch.conv.weight, geometry.groups), int(name.split("_")[2]))
            k, b = norm_of(branch.bn, padded(weight, geometry.kernel_size))
            kernel, bias = kernel + k, bias + b
    return kernel, bias


def repmixer(block, geometry):
    unit = eye(geometry.in_channels, geometry.kernel_size)
    kernel, bias = sum_of_branches()(block.mixer, geometry)
    normed, shift = norm_of(block.norm, unit)
    scale = block.scale.view(-1)
    return unit + scale.view(-1, 1, 1, 1) * (kernel - normed), scale * (bias - shift)


def orepa(block, geometry):
    layer, norm = block
    inputs, outputs = layer.weight.shape[1], layer.weight.shape[0] // geometry.groups
    height, width = geometry.kernel_size
    kernel = torch.zeros_like(layer.weight)
    v = layer.scales
    for o in range(layer.weight.shape[0]):
        group = o // outputs
        row, column = divmod(o % (height * width), width)
        for i in range(inputs):
            first = layer.inner[group] + torch.eye(inputs, dtype=torch.float64)
            composed = sum(first[m, i] * layer.outer[o, m] for m in range(inputs))
            separable = layer.mix[o, i] * layer.channel[group * inputs + i, 0]
            for y in range(height):
                for x in range(width):
                    wave = math.cos(math.pi * row * (y + 0.5) / height) * math.cos(math.pi * column * (x + 0.5) / width)
                    kernel[o, i, y, x] = (
                        v[0, o] * layer.weight[o, i, y, x]
                        + v[1, o] * layer.pointwise[o, i] * (y == height // 2 and x == width // 2)
                        + v[2, o] * layer.average[o, i] / (height * width)
                        + v[3, o] * layer.frequency[o, i] * wave
                        + v[4, o] * composed[y, x]
                        + v[5, o] * separable[y, x]
                    )
    return norm_of(norm, ungrouped(kernel, geometry.groups))


def constant_scale(block, geometry):
    scaled = block.sum["scaled"]
    kernel = scaled.dense_scale[:, None] * conv(scaled.dense, geometry)
    kernel = kernel + scaled.pointwise_scale[:, None] * conv(scaled.pointwise, geometry)
    if scaled.identity is not None:
        kernel = kernel + scaled.identity.view(-1, 1, 1, 1) * eye(geometry.in_channels, geometry.kernel_size)
    return norm_of(block.bn, kernel)


def randomized(block, seed=0):
    """Randomize every parameter and statistic; the block is left in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise.to(parameter.dtype)
        for part in block.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-1, 1, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
    return block.eval()


_CONV_NORMS = ("dense", "pointwise")

#: The formula of each block that equals a convolution.
PUBLISHED = {
    "conv_bn": conv_bn,
    "repvgg": sum_of_branches(),
    "repvgg_no_identity": sum_of_branches(),
    "repvgg_no_pointwise": sum_of_branches(),
    "repvgg_dense2": sum_of_branches(),
    "repvgg_identity_without_bn": sum_of_branches(normed=_CONV_NORMS),
    "repvgg_post_bn": sum_of_branches(normed=(), after=True),
    "dirac": dirac_net,
    "trivial": trivial,
    "acb": sum_of_conv_bn,
    "dbb": dbb,
    "doconv": doconv,
    "expand_cl": expand_layers,
    "expand_ck": expand_kernel,
    "mobileone": sum_of_branches(),
    "qarepvgg_s2": sum_of_branches(normed=_CONV_NORMS),
    "qarepvgg_s3": sum_of_branches(normed=("dense",)),
    "qarepvgg": sum_of_branches(normed=("dense",), after=True),
    "qarepvgg_v2": sum_of_branches(normed=("dense",), after=True, mean=True),
    "replk": replk,
    "unireplk": unireplk,
    "repmixer": repmixer,
    "orepa": orepa,
    "constant_scale": constant_scale,
}
