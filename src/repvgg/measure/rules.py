"""How many multiply-adds an op does: a rule for each kind of convolution and matrix product, and a list of the rest.

The convention is the paper's (RepVGG, CVPR 2021, §2.4, Table 4): one multiply-add is one FLOP, and only convolutions
and products of matrices count. Biases, normalization, activations, pooling and interpolation count nothing. Products
with the zeros of the padding are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """What one op multiplies.

    Attributes:
        macs: multiply-adds.
        winograd_macs: those of them that a Winograd algorithm can spare some of: stride-1, undilated 3x3 convolutions
            in two dimensions.
    """

    macs: int
    winograd_macs: int = 0

    def muls(self, tile: int = 2) -> int:
        """Multiplications that remain with Winograd's F(tile x tile, 3x3), where it applies.

        It takes (tile + 2)² in place of 9 · tile² for each tile of outputs: 4/9 for F(2x2, 3x3), which the paper counts
        (§2.4), and 1/4 for F(4x4, 3x3). Every output size is taken for a multiple of the tile, as the paper does; a
        real kernel pads an odd one.
        """
        return self.macs - self.winograd_macs + self.winograd_macs * (tile + 2) ** 2 // (9 * tile**2)


NOTHING = Work(0)

Rule = Callable[[tuple[Any, ...], Any], Work]


def _convolution(args: tuple[Any, ...], out: Tensor) -> Work:
    """``aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``.

    Each output value sums over I/groups · prod(kernel) products; if transposed, each input value spreads over
    O/groups · prod(kernel). Both are the number of values in one slice of the weight, ``weight[0]``.
    """
    x, weight, _, stride, _, dilation, transposed = args[:7]
    macs = (x if transposed else out).numel() * math.prod(weight.shape[1:])
    fast = weight.shape[2:] == (3, 3) and {*stride, *dilation} == {1} and not transposed
    return Work(macs, macs if fast else 0)


def _product(left: int, right: int) -> Rule:
    """(…, n, k) times (k) or (…, k, p), at these places of the arguments: n · k · p for each matrix of the batch."""

    def rule(args: tuple[Any, ...], out: Any) -> Work:
        a, b = args[left], args[right]
        return Work(a.numel() * (b.shape[-1] if b.dim() > 1 else 1))

    return rule


def _linear(args: tuple[Any, ...], out: Tensor) -> Work:
    """``aten.linear(x, weight, …)`` with the weight (O, I)."""
    return Work(out.numel() * int(args[1].shape[-1]))


def _attention(args: tuple[Any, ...], out: Any) -> Work:
    """Two products for each query head: (L, E) by (E, S), and (L, S) by (S, Ev); a causal mask spares nothing."""
    query, key, value = args[:3]
    return Work(query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


RULES: dict[str, Rule] = {
    "aten.convolution": _convolution,
    "aten._convolution": _convolution,
    "aten.mm": _product(0, 1),
    "aten._int_mm": _product(0, 1),
    "aten._scaled_mm": _product(0, 1),
    "aten.addmm": _product(1, 2),
    "aten._addmm_activation": _product(1, 2),
    "aten.bmm": _product(0, 1),
    "aten.baddbmm": _product(1, 2),
    "aten.addbmm": _product(1, 2),
    "aten.mv": _product(0, 1),
    "aten.addmv": _product(1, 2),
    "aten.dot": _product(0, 1),
    "aten.vdot": _product(0, 1),
    "aten.linear": _linear,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
}

_MAKE_OR_MOVE = """
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view alias arange bernoulli bernoulli_ cat channel_shuffle
    clone constant_pad_nd contiguous copy copy_ detach embedding empty empty_like empty_strided eye fill fill_ flip
    full full_like gather im2col index index_copy index_copy_ index_fill index_fill_ index_put index_put_
    index_select lift_fresh linspace masked_select native_channel_shuffle new_empty new_empty_strided new_full
    new_ones new_zeros nonzero normal normal_ ones ones_like pixel_shuffle pixel_unshuffle rand rand_like randint
    randn randn_like random_ reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d
    replication_pad2d replication_pad3d resize_ roll scalar_tensor scatter scatter_ set_ split_with_sizes_copy stack
    tril triu uniform uniform_ unsafe_split unsafe_split_with_sizes zero zero_ zeros zeros_like
"""
_POOL_OR_RESAMPLE = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d adaptive_avg_pool1d
    adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d fractional_max_pool2d
    max_pool2d_with_indices max_pool3d_with_indices upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
"""
_NORMALIZE = """
    _batch_norm_no_update _batch_norm_with_update _fused_rms_norm _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _safe_softmax _softmax batch_norm_elemt cudnn_batch_norm miopen_batch_norm
    native_batch_norm native_dropout native_group_norm native_layer_norm
"""
_REDUCE_OR_ORDER = """
    _unique2 all amax amin aminmax any argmax argmin argsort count_nonzero cumprod cumsum equal kthvalue
    linalg_vector_norm logsumexp max mean median min mode norm prod sort std std_mean sum topk unique_consecutive
    var var_mean
"""
_ELEMENTWISE = """
    _prelu_kernel bincount bucketize celu dequantize fake_quantize_per_channel_affine
    fake_quantize_per_tensor_affine glu hardswish hardswish_ isclose leaky_relu mish mish_ quantize_per_channel
    quantize_per_tensor rrelu_with_noise
"""

#: Ops that do no convolution and no matrix product. Views, and ops that PyTorch itself tags as pointwise, need no row.
WITHOUT_PRODUCTS = frozenset(
    f"aten.{name}"
    for name in " ".join((_MAKE_OR_MOVE, _POOL_OR_RESAMPLE, _NORMALIZE, _REDUCE_OR_ORDER, _ELEMENTWISE)).split()
)


def work_of(func: torch._ops.OpOverload, args: tuple[Any, ...], out: Any) -> Work | None:
    """The work of one call, or None where no rule knows the op."""
    name = name_of(func)
    if name in RULES:
        return RULES[name](args, out)
    return NOTHING if _does_nothing(func) else None


def is_known(func: torch._ops.OpOverload) -> bool:
    """Whether :func:`work_of` knows the op."""
    return name_of(func) in RULES or _does_nothing(func)


def name_of(func: torch._ops.OpOverload) -> str:
    """The name without the overload: "aten.add" for add.Tensor and add.Scalar alike."""
    return str(func.overloadpacket)


def _does_nothing(func: torch._ops.OpOverload) -> bool:
    return func.is_view or torch.Tag.pointwise in func.tags or name_of(func) in WITHOUT_PRODUCTS
