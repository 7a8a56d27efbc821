"""The verbs: give the convolutions of a model branches to train, or a batch norm each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg._contexts import eval_mode
from repvgg.algebra import ConvMap
from repvgg.blocks import ConvBN, Geometry, block_of
from repvgg.errors import FreshWeightsWarning, NothingExpandedWarning, ReparamError, UsageError
from repvgg.expansion.fitting import MakeBlock, block_for, difference, fit, like_conv, rep_block
from repvgg.expansion.report import Expanded, ExpandReport, Kept
from repvgg.expansion.sites import Site, Where, copy_of, not_replaceable, owners_of, replaced, sites_of
from repvgg.expansion.statistics import Data, Outputs, has_statistics, input_statistics, map_of, seen_behind, take_on
from repvgg.symbolic import trace
from repvgg.verify import isolated_eval


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
    with isolated_eval():
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
    with isolated_eval():
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
    with isolated_eval():
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


class Work:
    """One expansion of a copy of a model: what was made for which convolution, and why the others stay.

    Attributes:
        made: what takes the place of a convolution.
        errors: of those, how far they are from the convolution; None where they are to be trained to it.
        fresh: of the latter, why.
        reasons: of the others.
    """

    def __init__(self, original: nn.Module, model: nn.Module) -> None:
        self.originals = dict(original.named_modules(remove_duplicate=False))
        self.sites = sites_of(model)
        self.models = (original, model)
        self.made: dict[nn.Module, nn.Module] = {}
        self.errors: dict[nn.Module, float | None] = {}
        self.fresh: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}

    def chosen(self, where: Where, otherwise: str) -> list[Site]:
        """The convolutions that are asked for and may be replaced."""
        wanted = [site for site in self.sites if where(site.names[0], self.original(site))]
        self.reasons.update({s.conv: otherwise for s in self.sites if s not in wanted})
        self.reasons.update({s.conv: s.refusal for s in wanted if s.refusal})
        return [site for site in wanted if not site.refusal]

    def original(self, site: Site) -> nn.Conv2d:
        """The convolution of the input that stands where this one does."""
        found = self.originals.get(site.names[0])
        return found if isinstance(found, nn.Conv2d) else site.conv

    def put(self, conv: nn.Module, new: nn.Module, error: float | None) -> None:
        """Note what takes the place of ``conv``."""
        self.made[conv], self.errors[conv] = new, error

    def attempt(self, site: Site, make: MakeBlock, owners: Mapping[int, int], *, or_fresh: bool = False) -> None:
        """Make the block of one convolution, or note why there is none; fresh, if that will do, where none is equal."""
        reason = not_replaceable(site.conv, owners)
        if reason:
            self.reasons[site.conv] = reason
            return
        try:
            block = self.make(site.conv, make)
        except (ReparamError, UsageError) as error:
            self.reasons[site.conv] = str(error).rstrip(".")
            return
        try:
            self.put(site.conv, block, fit(block, site.conv))
        except (ReparamError, UsageError) as error:
            (self.fresh if or_fresh else self.reasons)[site.conv] = str(error).rstrip(".")
            if or_fresh:
                self.put(site.conv, self.make(site.conv, make), None)

    def make(self, conv: nn.Conv2d, make: MakeBlock) -> nn.Module:
        """A fresh block in the place of one convolution."""
        return like_conv(self.own(block_for(conv, make)), conv)

    def own(self, block: nn.Module) -> nn.Module:
        """Check that nothing else has the tensors of a block: they are about to be written to.

        Raises:
            ReparamError: they belong to the model, or to the block of another convolution.
        """
        taken = {id(tensor) for other in (*self.models, *self.made.values()) for tensor in _tensors(other)}
        if any(id(tensor) in taken for tensor in _tensors(block)):
            raise ReparamError("its block shares tensors with the model, or with the block of another convolution")
        return block

    def calibrate(self, out: nn.Module, data: Data) -> nn.Module:
        """Set the statistics in all blocks to those of ``data``, and fit once more for what that rounds."""
        norms = [part for block in self.made.values() for part in block.modules() if has_statistics(part)]
        seen = input_statistics(out, cast("list[_BatchNorm]", norms), data)
        for norm, statistics in seen.items():
            take_on(cast("_BatchNorm", norm), statistics, *map_of(cast("_BatchNorm", norm)))
        undone: dict[nn.Module, nn.Module] = {}
        for site in self.sites:
            if site.conv in self.made and site.conv not in self.fresh:
                undone |= self.fitted_again(site.conv)
        return replaced(out, undone)

    def fitted_again(self, conv: nn.Conv2d) -> dict[nn.Module, nn.Module]:
        """Fit one block anew; where that fails, the convolution is to come back in its place."""
        try:
            self.errors[conv] = fit(self.made[conv], conv)
            return {}
        except (ReparamError, UsageError) as error:
            self.reasons[conv] = f"with the statistics of the data, {str(error).rstrip('.')}"
            return {self.made.pop(conv): conv}

    def append_norm(self, site: Site, outputs: Outputs) -> None:
        """Wrap one convolution with the batch norm that leaves its outputs as they are."""
        norm = nn.BatchNorm2d(site.conv.out_channels)
        like_conv(norm, site.conv)
        one_C = torch.ones(norm.num_features, dtype=torch.float64)
        if outputs.refusal:
            self.reasons[site.conv] = outputs.refusal
        elif not take_on(norm, outputs.statistics, one_C, one_C * 0):
            self.reasons[site.conv] = f"what comes out of it on the data does not fit into {norm.weight.dtype}"
        else:
            with eval_mode(norm):
                error = difference(trace(norm), ConvMap.identity(norm.num_features))
            wrapped = ConvBN(site.conv, norm)
            wrapped.training = site.conv.training
            self.put(site.conv, wrapped, error)

    def report(self) -> ExpandReport:
        """All convolutions, in the order of the model; warns where none was expanded."""
        rows = tuple(self.row(site) for site in self.sites if site.conv in self.made)
        left = tuple(Kept(s.names[0], self.reasons[s.conv]) for s in self.sites if s.conv not in self.made)
        if not rows:
            why = f": {left[0].name or 'the model'} stays, because {left[0].reason}" if left else ": there is none"
            warnings.warn(f"No convolution was expanded{why}.", NothingExpandedWarning, stacklevel=3)
        return ExpandReport(rows, left)

    def row(self, site: Site) -> Expanded:
        """One convolution that was replaced."""
        before, after = (sum(p.numel() for p in m.parameters()) for m in (site.conv, self.made[site.conv]))
        error, fresh = self.errors[site.conv], self.fresh.get(site.conv, "")
        return Expanded(site.names[0], site.names[1:], _words(site.conv), before, after, error, fresh)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _words(conv: nn.Conv2d) -> str:
    return f"Conv2d({conv.extra_repr()})"  # type: ignore[no-untyped-call]
