"""The file of a quantized network: integers and scales of each layer, next to the plain network that they belong to."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from repvgg.checkpoints import read_checkpoint, save_tensors
from repvgg.errors import CheckpointError
from repvgg.quantization.affine import ActivationQuantizer, QuantizedWeight
from repvgg.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear

_HEADER = {"format": "pt", "repvgg_quantized": "1"}
_MARK = ".weight_integers"


def save_quantized(path: str | os.PathLike[str], quantized: nn.Module, *, overwrite: bool = False) -> Path:
    """Write the tensors of a network from :func:`repvgg.quantize` or quantization-aware training as safetensors.

    Raises:
        OutputError: the file cannot be written, or exists and ``overwrite`` is not set.
    """
    return save_tensors(path, quantized.state_dict(), _HEADER, overwrite=overwrite)


def load_quantized(path: str | os.PathLike[str], plain: nn.Module) -> nn.Module:
    """Return the network of a file from :func:`save_quantized`, in eval mode.

    Args:
        path: the file.
        plain: the plain network with layers of the same names and geometry; it is not changed.

    Raises:
        CheckpointError: the file cannot be read, or is that of another network.
    """
    tensors = read_checkpoint(path).tensors
    names = [name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK)]
    modules = dict(plain.named_modules())
    result = copy.deepcopy(plain)
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Conv2d | nn.Linear) or layer.weight.shape != tensors[name + _MARK].shape:
            raise CheckpointError(f"{str(path)!r} has a layer {name!r} that the plain network does not have.")
        scale = tensors.get(f"{name}.weight_scale")
        if scale is None:
            raise CheckpointError(f"{str(path)!r} has no scale of the weights of {name!r}: write it again.")
        result.set_submodule(name, _empty(layer, scale))
    if not names:
        raise CheckpointError(f"{str(path)!r} is no file of a quantized network: give one of save_quantized.")
    try:
        result.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{str(path)!r} is the file of another network than the plain one.") from error
    return result.eval()


def _empty(layer: nn.Conv2d | nn.Linear, scale: Tensor) -> QuantizedLayer:
    """Return a quantized layer of the geometry of ``layer``, to be filled."""
    weight = QuantizedWeight(torch.zeros(layer.weight.shape, dtype=torch.int8), torch.ones_like(scale))
    quantizer = ActivationQuantizer(1.0, 0)
    if isinstance(layer, nn.Conv2d):
        conv = copy.deepcopy(layer)
        conv.bias = None
        return QuantizedConv2d(conv, weight, quantizer)
    return QuantizedLinear(weight, None, quantizer)
