"""Every block in every geometry that it supports, and helpers of the tests that iterate over them."""

import itertools

import pytest
import torch
from torch import nn

import repvgg
from repvgg.blocks import BLOCKS, Geometry, create_block
from tests.blocks.published_formulas import randomized

EXACT = 1e-10
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
LINEAR = [name for name, entry in BLOCKS.items() if entry.is_linear]
MIN_KERNEL_SIZE = {"unireplk": 5, "expand_ck": 5}  # smaller kernels are unsupported, or a single convolution

GEOMETRIES = {
    "square": {},
    "5x5": {"kernel_size": 5},
    "7x7": {"kernel_size": 7},
    "wider": {"out_channels": 8},
    "narrower": {"out_channels": 2},
    "stride": {"stride": 2},
    "two strides": {"stride": (1, 2), "groups": 2},
    "groups": {"groups": 2},
    "groups, wider": {"groups": 2, "out_channels": 8},
    "depthwise": {"groups": 4},
    "depthwise, multiplied": {"groups": 4, "out_channels": 8},
    "dilation": {"dilation": 2},
    "dilation and stride": {"dilation": (2, 3), "stride": 2, "groups": 2},
    "reflect": {"padding_mode": "reflect", "dilation": 2},
    "replicate": {"padding_mode": "replicate", "stride": 2},
    "circular": {"padding_mode": "circular", "groups": 2},
}


def geometry_of(name, **changes):
    setting = {"in_channels": 4, "out_channels": 4, "kernel_size": MIN_KERNEL_SIZE.get(name, 3), **changes}
    setting["kernel_size"] = max(setting["kernel_size"], MIN_KERNEL_SIZE.get(name, 3))
    return Geometry.square(**setting)


def build_block(name, geometry, dtype=torch.float64):
    torch.manual_seed(0)
    return randomized(create_block(name, geometry).to(dtype))


def is_supported(name, geometry):
    """RepMixer adds its input; all other blocks support any geometry with a centre."""
    return name != "repmixer" or geometry.keeps_shape


def images(geometry, sizes=((19, 14), (16, 23)), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        x = torch.randn(2, geometry.in_channels, *size, generator=generator, dtype=torch.float64)
        yield (x + 1).to(dtype)


def relative_error(found, wanted):
    return float((found.double() - wanted.double()).detach().abs().max() / wanted.detach().abs().max())


def collapse_block(name, geometry, dtype=torch.float64):
    block = build_block(name, geometry, dtype)
    plain, report = repvgg.reparameterize(nn.Sequential(block, nn.ReLU()))
    return block, plain, report


def cases(keys):
    return [
        pytest.param(name, key, id=f"{name}-{key}")
        for name, key in itertools.product(LINEAR, keys)
        if is_supported(name, geometry_of(name, **GEOMETRIES[key]))
    ]
