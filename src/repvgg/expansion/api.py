"""The verbs: give the convolutions of a model branches to train, or a batch norm each."""

from __future__ import annotations

import warnings

from torch import nn

from repvgg.blocks import Geometry, block_of
from repvgg.errors import FreshWeightsWarning
from repvgg.expansion.branches import MakeBlock, rep_block
from repvgg.expansion.outputs import seen_behind
from repvgg.expansion.report import ExpandReport
from repvgg.expansion.sites import Where, copy_of, owners_of, replaced
from repvgg.expansion.statistics import Data
from repvgg.expansion.work import Work
from repvgg.verify import judging


def expand(
    model: nn.Module, block: MakeBlock = rep_block, *, where: Where | None = None, data: Data | None = None
) -> tuple[nn.Module, ExpandReport]:
    """Turn a plain model into one with trainable branches that computes the same function in eval mode.

    The inverse of :func:`repvgg.reparameterize`, for any model: each ``nn.Conv2d`` with kernel K becomes a block in
    which one convolution of its size takes what the other branches leave over. With s the scale behind that *dense*
    convolution and R the kernel of all other branches, both read off the block's own forward in float64, ::

        W_dense = (K − R) / s

    and a shift in the block, such as the β of a batch norm, takes the bias. The other branches keep their random
    initial values. Every block is run beside its convolution in float64, on images whose border counts, and must be
    equal within a relative 1e-12; where it is not, the convolution stays. Then it is cast once.

    Fresh batch norms have mean 0 and variance 1, so the first training steps would see other numbers than eval mode
    does. With ``data``, the statistics of the blocks become those of the data, over all batches alike, and γ and
    β follow such that eval mode stays as it is: ``γ = s·√(σ² + ε)`` and ``β = t + s·μ`` for one that was ``s·x + t``.

    Args:
        model: any model; it is left untouched.
        block: from a convolution (a copy of it) to a fresh module of the same geometry, or None where there is none.
        where: ``(name, conv) -> bool``, which convolutions to take; all whose kernel is larger than 1, unless given.
        data: a batch (N, C, H, W) as the model takes it, or an iterable of batches, or of tuples that start with one.

    Returns:
        The expanded model, new, sharing nothing with the input, in its dtype, device and modes; and the report.
        A convolution that is registered at several places becomes one block at all of them.

    Raises:
        ReparamError: the model cannot be copied.
        UsageError: there are no batches in ``data``, or they are no tensors.

    Warns:
        NothingExpandedWarning: no convolution got a block; the outcome is a copy.

    Limits: a convolution whose kernel is zero, or tiny beside the other branches, stays. In half precision the dense
    kernel is rounded beside an identity of size 1: see ``error`` in the report. The random states of PyTorch are put
    back, so the branches depend on the seed alone. A wrapper of torch.compile is not looked through: pass the model
    inside it. Hooks on the model run on ``data``.

    Source: Ding et al., CVPR 2021, Eq. 3 and 4, solved for the kernel of the largest branch.
    """
    with judging():
        out = copy_of(model)
        work = Work(model, out)
        owners = owners_of(out)
        for site in work.chosen(where or _larger_than_one, _not_wanted(where)):
            work.attempt(site, block, owners)
        out = replaced(out, work.made)
        if data is not None:
            out = work.calibrate(out, data)
    return out, work.report()


def replace_convs(
    model: nn.Module, block: str | MakeBlock, *, where: Where | None = None, data: Data | None = None
) -> tuple[nn.Module, ExpandReport]:
    """Put a block of the table in the place of each convolution; the same function at that moment where that can be.

    As :func:`expand`, with two differences: the block is told by its name, and one that cannot begin as its convolution
    begins with fresh values, to be trained. Which those are, and why, the report says: ``report.is_exact`` and the
    ``fresh`` of its rows. DiracNet's kernel is normalized and ExpandNet's is a product: neither is affine in the
    kernel of a convolution inside, which is what is solved for. With ReLUs in its branches no block is a convolution.

    Args:
        model: any model; it is left untouched.
        block: a name of :data:`repvgg.blocks.BLOCKS`, such as "dbb", or a function as :func:`expand` takes it.
        where: ``(name, conv) -> bool``, which convolutions to take; all whose kernel is larger than 1, unless given.
        data: see :func:`expand`.

    Returns:
        The new model, sharing nothing with the input, in its dtype, device and modes; and the report.

    Raises:
        ReparamError: the model cannot be copied.
        UsageError: there is no such block; or there are no batches in ``data``, or they are no tensors.

    Warns:
        NothingExpandedWarning: no convolution got a block; the outcome is a copy.
        FreshWeightsWarning: some blocks begin with fresh values, and the model computes something else.

    Limits: those of :func:`expand`. A batch norm that follows a convolution stays behind the block.
    """
    make = _of_the_table(block) if isinstance(block, str) else block
    with judging():
        out = copy_of(model)
        work = Work(model, out)
        owners = owners_of(out)
        for site in work.chosen(where or _larger_than_one, _not_wanted(where)):
            work.attempt(site, make, owners, or_fresh=True)
        out = replaced(out, work.made)
        if data is not None:
            out = work.calibrate(out, data)
    report = work.report()
    _warn_of_fresh(report)
    return out, report


def _of_the_table(name: str) -> MakeBlock:
    row = block_of(name)
    return lambda conv: row.make(Geometry.of(conv))


def _warn_of_fresh(report: ExpandReport) -> None:
    fresh = [row for row in report.expanded if row.fresh]
    if fresh:
        warnings.warn(
            f"{len(fresh)} of {len(report.expanded)} blocks begin with fresh values, so the model computes something "
            f"else until it is trained: {fresh[0].fresh}.",
            FreshWeightsWarning,
            stacklevel=3,
        )


def insert_bn(model: nn.Module, data: Data, *, where: Where | None = None) -> tuple[nn.Module, ExpandReport]:
    """Put a batch norm behind each convolution of a plain model, such that nothing moves.

    For training the plain form on: with μ and σ² the mean and variance of each channel that the convolution puts out on
    ``data``, the batch norm gets ``running_mean = μ``, ``running_var = σ²``, ``γ = √(σ² + ε)`` and ``β = μ``. It is the
    identity in eval mode, and in training mode on the same data too. ``repvgg.reparameterize`` folds it back.

    Each convolution stays as it is, bias included, as ``conv`` in a :class:`repvgg.blocks.ConvBN` with ``bn``.

    Args:
        model: any model, run on ``data`` in eval mode; it is left untouched.
        data: a batch (N, C, H, W) as the model takes it, or an iterable of batches, or of tuples that start with one.
        where: ``(name, conv) -> bool``, which convolutions to take; all, unless given.

    Returns:
        The new model, sharing nothing with the input, in its dtype, device and modes; and the report.

    Raises:
        ReparamError: the model cannot be copied.
        UsageError: there are no batches in ``data``, or they are no tensors.

    Warns:
        NothingExpandedWarning: no convolution got a batch norm; the outcome is a copy.

    Limits: a bias in front of a batch norm gets no gradient in training mode; β takes its part. Convolutions that a
    batch norm follows already are left alone. Hooks on the model run on ``data``.
    """
    with judging():
        out = copy_of(model)
        work = Work(model, out)
        seen = seen_behind(out, work.chosen(where or _any, _not_wanted(where)), data)
        for site, outputs in seen.items():
            work.append_norm(site, outputs)
        out = replaced(out, work.made)
    return out, work.report()


def _larger_than_one(_: str, conv: nn.Conv2d) -> bool:
    return max(conv.kernel_size) > 1


def _any(_: str, __: nn.Conv2d) -> bool:
    return True


def _not_wanted(where: Where | None) -> str:
    return "its kernel is 1x1: ask for it with where=" if where is None else "where= leaves it out"
