"""Record every op that a forward pass executes, with its multiply-adds, memory traffic and live activations.

:func:`walk` runs a model once under a ``TorchDispatchMode``; :func:`count` returns the usual totals.

Counting convention (RepVGG, CVPR 2021, §2.4 and Table 4): one multiply-add is one FLOP, and only convolutions and
matrix products count. Biases, normalization, activations, pooling and interpolation count nothing. Products with the
zeros of the padding are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg._arguments import check_model
from repvgg._contexts import eval_mode
from repvgg.errors import UsageError
from repvgg.measure.memory import LiveStorageTracker
from repvgg.measure.traffic import Traffic, new_outputs, op_name, tensors_in, traffic_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one op."""

    macs: int
    # The part of `macs` that a Winograd algorithm can reduce: stride-1, undilated 2-D 3x3 convolutions.
    winograd_macs: int = 0

    def muls(self, tile: int = 2) -> int:
        """Return the multiplications that remain with Winograd's F(tile x tile, 3x3) wherever it applies.

        A tile of outputs takes (tile + 2)² multiplications in place of 9 · tile²: 4/9 for F(2x2, 3x3), which the paper
        counts (§2.4), and 1/4 for F(4x4, 3x3). Like the paper, this treats every output size as a multiple of the tile;
        a real kernel pads the last tile.
        """
        return self.macs - self.winograd_macs + self.winograd_macs * (tile + 2) ** 2 // (9 * tile**2)


@dataclass(frozen=True)
class Op:
    """One executed op."""

    name: str  # such as "aten.convolution", without the overload
    inputs: tuple[Shape, ...]  # shapes of the tensors among its arguments, in order
    outputs: tuple[Shape, ...]  # shapes of the tensors that it returned
    work: Work | None  # its multiply-adds; None if no rule knows the op
    path: str = ""  # of the innermost module that executed it; "" for the model itself
    traffic: Traffic | None = None  # bytes read and written; None if unknown
    live_bytes: int = 0  # activation memory while it runs: its outputs and everything that is still referenced

    @property
    def macs(self) -> int:
        """Multiply-adds; 0 if unknown."""
        return self.work.macs if self.work else 0

    def muls(self, tile: int = 2) -> int:
        """Return the multiplications with Winograd's F(tile x tile, 3x3) where it applies; 0 if unknown."""
        return self.work.muls(tile) if self.work else 0


@dataclass(frozen=True)
class Walk:
    """Ops of one forward pass, in the order of execution."""

    ops: tuple[Op, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all known ops."""
        return sum(op.macs for op in self.ops)

    def muls(self, tile: int = 2) -> int:
        """Return the multiplications of all known ops with Winograd's F(tile x tile, 3x3)."""
        return sum(op.muls(tile) for op in self.ops)

    @property
    def bytes_read(self) -> int:
        """Bytes read by all ops whose traffic is known."""
        return sum(op.traffic.read for op in self.ops if op.traffic)

    @property
    def bytes_written(self) -> int:
        """Bytes written by all ops whose traffic is known."""
        return sum(op.traffic.written for op in self.ops if op.traffic)

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written by all ops whose traffic is known."""
        return self.bytes_read + self.bytes_written

    @property
    def peak(self) -> int:
        """Peak activation memory in bytes: inputs count, parameters and buffers do not."""
        return max((op.live_bytes for op in self.ops), default=0)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Sorted names of ops without a rule; if there are any, the multiply-adds are lower bounds."""
        return tuple(sorted({op.name for op in self.ops if op.work is None}))

    @property
    def unknown_traffic(self) -> tuple[str, ...]:
        """Sorted names of ops whose traffic is unknown; if there are any, ``bytes_moved`` is a lower bound."""
        return tuple(sorted({op.name for op in self.ops if op.traffic is None}))


@dataclass(frozen=True)
class Counts:
    """Parameters and arithmetic of a model for one image."""

    params: int  # number of parameter values; shared ones count once, buffers (BN statistics) do not count
    macs: int  # multiply-adds of convolutions and matrix products; the paper prints them as FLOPs, in 10⁹
    winograd_muls: int  # multiplications if stride-1 3x3 convolutions take 4/9 of them (paper §2.4, "Wino MULs")
    # Names of ops without a rule; if there are any, `macs` and `winograd_muls` are lower bounds.
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**asdict(self), "unknown": list(self.unknown)}

    def __str__(self) -> str:
        text = f"{self.params:,} parameters, {self.macs / 1e9:.3f} GMACs, {self.winograd_muls / 1e9:.3f} Wino GMULs"
        return f"{text} (not counted: {', '.join(self.unknown)})" if self.unknown else text


def count(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> Counts:
    """Count the parameters and arithmetic of ``model`` in eval mode, for one image.

    The train form and the plain form of a model are equal functions with different counts; the paper's tables show the
    plain form.

    Args:
        model: takes one tensor. On the meta device nothing is computed and no memory is used; elsewhere the model runs
            once, on its device and in its dtype. It is not changed.
        input_shape: (N, …) of its input. N is ignored: the model runs on one image.

    Raises:
        UsageError: the shape has fewer than two axes, or a size below 1.

    Limits: see :func:`walk`.
    """
    check_model(model, "count")
    if len(input_shape) < 2 or min(input_shape) < 1:
        raise UsageError(f"input_shape must be (N, …) with every size at least 1, got {tuple(input_shape)}.")
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros((1, *input_shape[1:]), dtype=first.dtype, device=first.device)
    done = walk(model, image)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Counts(params, done.macs, done.muls(), done.unknown)


def walk(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> Walk:
    """Run ``model`` once, in eval mode and without gradients, and record every op that PyTorch executes.

    The model runs on the device of its tensors; on meta tensors nothing is computed and no memory is used. The
    ``training`` flags are restored.

    Args:
        model: any module; it is not changed.
        inputs: its argument, or its arguments. The caller keeps them alive, so they count to the end.

    Raises:
        UsageError: there are no inputs, or one of them is not a tensor.

    Limits: only ops that go through PyTorch's dispatcher are seen. Kernels called past it (ctypes, NumPy) are not, nor
    is the scratch memory of a kernel. Attention is one op on the CPU and on a GPU; on the meta device it is decomposed
    into its matrix products, which move more bytes.
    """
    check_model(model, "walk")
    arguments = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not arguments or not all(isinstance(argument, Tensor) for argument in arguments):
        raise UsageError("walk() needs at least one input, and every input must be a tensor.")
    tracker = LiveStorageTracker(model)
    tracker.live_bytes(arguments)
    with eval_mode(model), torch.no_grad(), module_path(model) as path, _Recorder(path, tracker) as recorder:
        model(*arguments)
    return Walk(tuple(recorder.ops))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled under this mode, and True would make PyTorch import all of torch._dynamo (seconds).
        return False

    def __init__(self, path: Callable[[], str], tracker: LiveStorageTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self._path, self._tracker = path, tracker

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = has_rule(func)
        if not known:
            # Composite ops without a rule are recorded as the ops that PyTorch composes them of. Re-entering the mode
            # is needed because it is switched off inside its own handler.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = _output_on_meta(func, args)
        if out is None:
            out = func(*args, **kwargs)
        op = Op(
            name=op_name(func),
            inputs=_shapes((args, kwargs)),
            outputs=_shapes(out),
            work=work_of(func, args, out),
            path=self._path(),
            traffic=traffic_of(func, args, kwargs, out) if known else None,
            live_bytes=self._tracker.live_bytes(new_outputs(func, args, out)),
        )
        self.ops.append(op)
        return out


_META_ELEMENTWISE = {f"aten.{name}" for name in ("relu", "silu", "gelu", "hardswish", "hardsigmoid", "hardtanh")}
_META_IN_PLACE = {f"{name}_" for name in _META_ELEMENTWISE}


def _output_on_meta(func: Any, args: tuple[Any, ...]) -> Any:
    """Return what a frequent op returns for a meta tensor, None for all others.

    PyTorch's own rules of these ops are written in Python, take 1 to 4 ms a call, and seconds to import.
    """
    x = args[0] if args else None
    if type(x) is not Tensor or not (x.is_meta and x.is_floating_point() and x.is_contiguous()):
        return None
    name = op_name(func)
    if name in _META_IN_PLACE:
        return x
    if name in _META_ELEMENTWISE and str(func).endswith(".default"):  # others write to a given tensor
        return torch.empty_like(x)
    if str(func) == "aten.upsample_bilinear2d.default" and x.dim() == 4 and min(x.shape) and min(args[1]) > 0:
        return x.new_empty((*x.shape[:2], *args[1]))
    if name != "aten.native_batch_norm" or len(args) < 6 or args[5]:
        return None
    statistics = args[3:5]
    if x.dim() < 2 or not all(isinstance(one, Tensor) and one.shape == x.shape[1:2] for one in statistics):
        return None  # an error, which PyTorch explains
    saved = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), saved, torch.empty_like(saved)


def _shapes(value: Any) -> tuple[Shape, ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(value))


@contextmanager
def module_path(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that returns the path of the innermost running submodule of ``model``.

    The path is "" for the model itself and outside of it. A module with several paths goes by the first one.
    """
    path_of = {id(module): path for path, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in path_of:
            running.append(path_of[id(module)])

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in path_of:
            running.pop()

    # Global hooks leave the modules untouched. always_call: a forward whose error the model catches must pop its path.
    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield lambda: running[-1] if running else ""
    finally:
        for hook in hooks:
            hook.remove()


Rule = Callable[[tuple[Any, ...], Any], Work]


def _convolution(args: tuple[Any, ...], out: Tensor) -> Work:
    """``aten.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    x, weight, _, stride, _, dilation, transposed = args[:7]
    # Each output value sums I/groups · prod(kernel) products; transposed, each input value spreads to O/groups ·
    # prod(kernel) outputs. In both layouts (OIHW and IOHW) that is the number of values in weight[0].
    macs = (x if transposed else out).numel() * math.prod(weight.shape[1:])
    winograd = weight.shape[2:] == (3, 3) and {*stride, *dilation} == {1} and not transposed
    return Work(macs, macs if winograd else 0)


def _matmul(left: int, right: int) -> Rule:
    """Rule for (…, n, k) times (k) or (…, k, p) at these argument positions: n · k · p for each matrix of the batch."""

    def rule(args: tuple[Any, ...], out: Any) -> Work:
        a, b = args[left], args[right]
        return Work(a.numel() * (b.shape[-1] if b.dim() > 1 else 1))

    return rule


def _linear(args: tuple[Any, ...], out: Tensor) -> Work:
    """``aten.linear(x, weight, …)`` with the weight (O, I)."""
    return Work(out.numel() * int(args[1].shape[-1]))


def _attention(args: tuple[Any, ...], out: Any) -> Work:
    """Two products for each query head: (L, E) by (E, S), and (L, S) by (S, Ev); a causal mask saves nothing."""
    query, key, value = args[:3]
    return Work(query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


RULES: dict[str, Rule] = {
    "aten.convolution": _convolution,
    "aten._convolution": _convolution,
    "aten.mm": _matmul(0, 1),
    "aten._int_mm": _matmul(0, 1),
    "aten._scaled_mm": _matmul(0, 1),
    "aten.addmm": _matmul(1, 2),
    "aten._addmm_activation": _matmul(1, 2),
    "aten.bmm": _matmul(0, 1),
    "aten.baddbmm": _matmul(1, 2),
    "aten.addbmm": _matmul(1, 2),
    "aten.mv": _matmul(0, 1),
    "aten.addmv": _matmul(1, 2),
    "aten.dot": _matmul(0, 1),
    "aten.vdot": _matmul(0, 1),
    "aten.linear": _linear,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten._scaled_dot_product_fused_attention_overrideable": _attention,
}

_CREATE_OR_COPY = """
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
_REDUCE_OR_SORT = """
    _unique2 all amax amin aminmax any argmax argmin argsort count_nonzero cumprod cumsum equal kthvalue
    linalg_vector_norm logsumexp max mean median min mode norm prod sort std std_mean sum topk unique_consecutive
    var var_mean
"""
_ELEMENTWISE = """
    _prelu_kernel bincount bucketize celu dequantize fake_quantize_per_channel_affine
    fake_quantize_per_tensor_affine glu hardswish hardswish_ isclose leaky_relu mish mish_ quantize_per_channel
    quantize_per_tensor rrelu_with_noise
"""

#: Ops without a convolution or matrix product. Views and ops that PyTorch tags as pointwise are recognized without it.
ZERO_MAC_OPS = frozenset(
    f"aten.{name}"
    for name in " ".join((_CREATE_OR_COPY, _POOL_OR_RESAMPLE, _NORMALIZE, _REDUCE_OR_SORT, _ELEMENTWISE)).split()
)


def work_of(func: torch._ops.OpOverload, args: tuple[Any, ...], out: Any) -> Work | None:
    """Return the work of one call; None if no rule knows the op."""
    if rule := RULES.get(op_name(func)):
        return rule(args, out)
    return Work(0) if _has_no_macs(func) else None


def has_rule(func: torch._ops.OpOverload) -> bool:
    """Return whether :func:`work_of` knows the op."""
    return op_name(func) in RULES or _has_no_macs(func)


def _has_no_macs(func: torch._ops.OpOverload) -> bool:
    return func.is_view or torch.Tag.pointwise in func.tags or op_name(func) in ZERO_MAC_OPS
