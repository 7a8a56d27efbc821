"""Make a block in the geometry of a convolution, and solve for parameters that make the two equal.

In eval mode, the kernel that a block is equal to is affine in the kernel W of a convolution inside it, ::

    K(W) = s ⊙ W + R        b(p) = t ⊙ p + c

with R from the other branches, and its bias is affine in a parameter p that only shifts. Two traces determine R and s,
two more c and t; then ``W = (K − R) / s`` and ``p = (b − c) / t``. Nothing is assumed about names or classes, nor that
the equations hold: the result is traced, and then run and compared with the convolution.

Letters: O output channels, I input channels of one group, H and W the kernel's height and width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from repvgg._contexts import eval_mode
from repvgg.algebra import ConvMap
from repvgg.blocks import BranchSum, Geometry, branches_of
from repvgg.errors import EquivalenceError, NotLinearError, ReparamError, RepvggError
from repvgg.symbolic import algebra_device, trace
from repvgg.verify import border_inputs, verify

MakeBlock = Callable[[nn.Conv2d], nn.Module | None]

EXACT = 1e-12  # the largest relative error in float64
_MIN_RELATIVE_SLOPE = 1e-6  # dividing by a slope smaller than this, relative to the largest one, is not accurate


def rep_block(conv: nn.Conv2d) -> BranchSum:
    """Return the branches of RepVGG for a convolution: kxk, 1x1 and, if the shapes match, the identity, each with a BN.

    Any odd kernel, stride, dilation, groups and padding mode; randomly initialized, and nothing of ``conv`` is copied.
    See :func:`repvgg.blocks.rep_conv` for the formula.

    Raises:
        BorderError: the padding is not ``dilation · (k − 1) / 2``: 1x1 and identity would read around other pixels.
        UsageError: the kernel size is even.
    """
    branches = branches_of(Geometry.of(conv))
    assert isinstance(branches, BranchSum)  # nothing follows the sum
    return branches


def make_block(conv: nn.Conv2d, make: MakeBlock) -> nn.Module:
    """Return what ``make`` returns for a copy of ``conv``; raise ReparamError if there is no block for it."""
    try:
        # A copy, because make may keep or modify what it gets.
        block = make(copy.deepcopy(conv))
    except RepvggError as error:
        raise ReparamError(str(error).rstrip(".")) from error
    except Exception as error:
        raise ReparamError(f"the block cannot be made ({type(error).__name__}: {error})") from error
    if block is None:
        raise ReparamError("there is no block for it")
    return block


def match_conv(block: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Set a module to the dtype, device, memory format and training mode of ``conv``, and freeze it if that is."""
    weight = next(iter(conv.parameters()))
    block.to(weight)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        block.to(memory_format=torch.channels_last)
    if not weight.requires_grad:
        block.requires_grad_(False)
    return block.train(conv.training)


def solve_block(block: nn.Module, conv: nn.Conv2d) -> float:
    """Set parameters of ``block`` so that in eval mode it computes what ``conv`` does.

    Solved in float64 and cast once to the dtype of the block. Call it without gradients. Returns the largest
    difference in kernel or bias after the cast, relative to the largest number in them.

    Raises:
        NotLinearError: the block is not a convolution of that geometry, or no parameter of it can be solved for.
        EquivalenceError: the solution is not equal within 1e-12 in float64; or its numbers do not fit the dtype.
        ReparamError: the block cannot be traced; see :func:`repvgg.trace`.
    """
    target = trace(conv)
    with eval_mode(block):
        # Solving in float64 makes the check strict: a difference is then a wrong solution, not rounding.
        exact = copy.deepcopy(block).to(device=algebra_device(conv.weight), dtype=torch.float64)
        _Solver(exact, conv, target).solve()
        for own, solved in zip(block.parameters(), exact.parameters(), strict=True):
            own.copy_(solved)
        error = max_difference(trace(block, conv.in_channels), target)
    if not math.isfinite(error):
        raise EquivalenceError(f"the numbers that the block would need do not fit into {conv.weight.dtype}")
    return error


def max_difference(found: ConvMap, target: ConvMap) -> float:
    """Return ``max |found − target|`` over kernel and bias, relative to the largest number of the target."""
    ours, theirs = (torch.cat([m.weight.flatten(), m.bias_or_zeros()]).double() for m in (found, target))
    return _relative_difference(ours, theirs)


def _relative_difference(found: Tensor, target: Tensor) -> float:
    """``max|found − target| / max|target|``; absolute if the target is zero."""
    return float((found - target).abs().max() / (target.abs().max() or 1.0))


def _is_divisor(slope: Tensor) -> bool:
    size = slope.abs()
    return bool(slope.isfinite().all()) and float(size.min()) > _MIN_RELATIVE_SLOPE * float(size.max())


class _Solver:
    """One block in float64, and the convolution that it is solved for."""

    def __init__(self, block: nn.Module, conv: nn.Conv2d, target: ConvMap) -> None:
        self.block, self.conv, self.target = block, conv, target
        self.kernel_OIHW, self.bias_O = target.weight.clone(), target.bias_or_zeros().clone()

    def solve(self) -> None:
        """Try the convolutions that have the size of the target, in the order of the block, until one works."""
        reasons = []
        before = [parameter.clone() for parameter in self.block.parameters()]
        # A block may contain several kernels of that size, of which some feed a ReLU or another convolution.
        for weight in self._candidates():
            try:
                self._solve_kernel(weight)
                self._solve_bias()
                return self._check()
            except ReparamError as error:
                reasons.append(error)
            for parameter, value in zip(self.block.parameters(), before, strict=True):
                parameter.copy_(value)
        shape = "x".join(map(str, self.conv.weight.shape))
        raise reasons[0] if reasons else NotLinearError(f"no convolution in the block has a kernel of {shape}")

    def _candidates(self) -> Iterator[Tensor]:
        """Yield the kernels of the shape of the target."""
        for part in self.block.modules():
            weight = part._parameters.get("weight") if isinstance(part, nn.Conv2d) else None
            if weight is not None and weight.shape == self.conv.weight.shape and part.groups == self.conv.groups:
                yield weight

    def _trace(self) -> tuple[Tensor, Tensor]:
        """Return kernel and bias of the block with its current parameters."""
        found = trace(self.block, self.conv.in_channels)
        ours, theirs = ((m.in_channels, m.out_channels, m.groups, m.axes, m.border) for m in (found, self.target))
        if ours != theirs:
            raise NotLinearError(f"the block is a {found}, and the convolution a {self.target}")
        return found.weight.clone(), found.bias_or_zeros().clone()

    def _trace_with(self, parameter: Tensor, value: float) -> tuple[Tensor, Tensor]:
        parameter.fill_(value)
        return self._trace()

    def _solve_kernel(self, weight_OIHW: Tensor) -> None:
        """Set ``W = (K − R) / s``."""
        rest_OIHW = self._trace_with(weight_OIHW, 0.0)[0]
        slope_OIHW = self._trace_with(weight_OIHW, 1.0)[0] - rest_OIHW
        if not _is_divisor(slope_OIHW):
            raise NotLinearError("the block scales some channels of its dense convolution by zero, or nearly so")
        weight_OIHW.copy_((self.kernel_OIHW - rest_OIHW) / slope_OIHW)
        weight_OIHW += (self.kernel_OIHW - self._trace()[0]) / slope_OIHW  # one step of iterative refinement
        if not self._has_kernel(self._trace()[0]):
            raise NotLinearError("the kernel of the block is not that of its dense convolution, scaled and shifted")

    def _solve_bias(self) -> None:
        """Set ``p = (b − c) / t`` for the first parameter that shifts all channels and leaves the kernel unchanged."""
        if _relative_difference(self._trace()[1], self.bias_O) <= EXACT:
            return
        for parameter in self.block.parameters():
            # Try every parameter of that size: the block's own code decides whether it is a shift.
            if parameter.numel() == len(self.bias_O) and self._try_shift(parameter):
                return
        raise NotLinearError("nothing in the block can carry the bias: no parameter shifts each of its channels")

    def _try_shift(self, parameter: Tensor) -> bool:
        """Solve for one parameter, or restore it and return False."""
        before = parameter.clone()
        try:
            kernel_OIHW, rest_O = self._trace_with(parameter, 0.0)
            other_OIHW, shifted_O = self._trace_with(parameter, 1.0)
            slope_O = shifted_O - rest_O
            if self._has_kernel(kernel_OIHW) and self._has_kernel(other_OIHW) and _is_divisor(slope_O):
                parameter.copy_(((self.bias_O - rest_O) / slope_O).view_as(parameter))
                parameter += ((self.bias_O - self._trace()[1]) / slope_O).view_as(parameter)
                return True
        except ReparamError:  # for example a shift before a padded convolution
            pass
        parameter.copy_(before)
        return False

    def _has_kernel(self, kernel_OIHW: Tensor) -> bool:
        return _relative_difference(kernel_OIHW, self.kernel_OIHW) <= EXACT

    def _check(self) -> None:
        """Run both on images whose borders count, and compare."""
        height, width = (axis.reach + 2 * axis.stride + 3 for axis in self.target.axes)
        images = border_inputs((1, self.conv.in_channels, height, width), dtype=torch.float64)
        exact = copy.deepcopy(self.conv).to(self.kernel_OIHW)
        try:
            evidence = verify(lambda x: exact(x.to(self.kernel_OIHW)), self.block, images, tolerance=EXACT)
        except Exception as error:  # user code
            raise EquivalenceError(f"the block cannot be run in float64 ({type(error).__name__}: {error})") from error
        if not evidence.passed:
            raise EquivalenceError(f"the block differs from the convolution by {evidence.relative:.1e} in float64")
