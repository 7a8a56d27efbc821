"""The public functions: give the convolutions of a model trainable branches, or a batch norm each; and the report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg._arguments import check_model
from repvgg._contexts import eval_mode
from repvgg._html import table as html_table
from repvgg.algebra import ConvMap
from repvgg.blocks import ConvBN, Geometry, block_of
from repvgg.errors import FreshWeightsWarning, NothingExpandedWarning, ReparamError, UsageError
from repvgg.expansion.fitting import MakeBlock, make_block, match_conv, max_difference, rep_block, solve_block
from repvgg.expansion.sites import (
    Site,
    Where,
    count_owners,
    deep_copy,
    find_sites,
    replace_modules,
    why_not_replaceable,
)
from repvgg.expansion.statistics import (
    Data,
    OutputStatistics,
    has_statistics,
    input_statistics,
    output_statistics,
    scale_and_shift,
    set_statistics,
)
from repvgg.symbolic import trace
from repvgg.verify import isolated_eval


@dataclass(frozen=True)
class Expanded:
    """A convolution that became a module with more parameters.

    Attributes:
        name: path of the convolution, and now of the module that replaced it.
        also: further paths of the same module, if it is shared.
        convolution: a description of the convolution.
        parameters_before: number of parameters of the convolution.
        parameters_after: number of parameters of its replacement.
        error: largest difference in kernel or bias from the convolution, as stored in its dtype, relative to the
            largest number in them. It was at most 1e-12 in float64; the rest is rounding. None if the block starts with
            new values.
        fresh: why the block starts with new values, and computes another function; empty if it does not.
    """

    name: str
    also: tuple[str, ...]
    convolution: str
    parameters_before: int
    parameters_after: int
    error: float | None
    fresh: str = ""


@dataclass(frozen=True)
class Skipped:
    """A convolution that stays unchanged, with the reason."""

    name: str
    reason: str


Kept = Skipped  # the former name, kept for code that imports it


@dataclass(frozen=True, repr=False)
class ExpandReport:
    """What an expansion did with each convolution of a model.

    Attributes:
        expanded: the convolutions that were replaced, in the order of the model.
        left: all others, with the reason.
    """

    expanded: tuple[Expanded, ...]
    left: tuple[Skipped, ...]

    @property
    def parameters_added(self) -> int:
        """The number of additional parameters."""
        return sum(entry.parameters_after - entry.parameters_before for entry in self.expanded)

    @property
    def is_exact(self) -> bool:
        """Whether each block starts out equal to the convolution that it replaces."""
        return not any(entry.fresh for entry in self.expanded)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"ExpandReport({self._summary})"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = [
            (
                entry.name or "(root)",
                entry.convolution,
                f"new weights: {entry.fresh}" if entry.error is None else f"error {entry.error:.1e}",
                entry.parameters_before,
                entry.parameters_after,
            )
            for entry in self.expanded
        ]
        rows += [(one.name or "(root)", "", f"skipped: {one.reason}", "", "") for one in self.left]
        columns = ("convolution", "geometry", "result", "parameters before", "parameters after")
        return html_table(self._summary, columns, rows)

    @property
    def _summary(self) -> str:
        counts = f"{len(self.expanded)} convolutions expanded, {self.parameters_added:,} parameters added"
        return counts + (f", {len(self.left)} skipped" if self.left else "")

    def _lines(self) -> Iterator[str]:
        yield f"{len(self.expanded)} convolutions expanded, {self.parameters_added:,} parameters added"
        for entry in self.expanded:
            also = f" (also {', '.join(entry.also)})" if entry.also else ""
            how = f"new weights: {entry.fresh}" if entry.error is None else f"error {entry.error:.1e}"
            yield f"  {entry.name or '(root)'}{also}: {entry.convolution}, {how}"
        if self.left:
            yield f"{len(self.left)} skipped"
        for skipped in self.left:
            yield f"  {skipped.name or '(root)'}: {skipped.reason}"


def expand(
    model: nn.Module, block: MakeBlock = rep_block, *, where: Where | None = None, data: Data | None = None
) -> tuple[nn.Module, ExpandReport]:
    """Turn a plain model into one with trainable branches that computes the same function in eval mode.

    The inverse of :func:`repvgg.reparameterize`, for any model: each ``nn.Conv2d`` with kernel K becomes a block of
    which one convolution, the *dense* one, has the size of K and is solved for. With s the scale after it and R the
    sum of the kernels of all other branches, both derived from the block's own forward in float64, ::

        W_dense = (K − R) / s

    and a shift in the block, such as the β of a batch norm, is solved for the bias. The other branches keep their
    random initial values. Every block is compared with its convolution in float64, on border-exposing images, and must
    be equal within a relative 1e-12; otherwise the convolution stays. Then it is cast once.

    New batch norms have mean 0 and variance 1, so the first training steps would see other activations than eval mode
    does. With ``data``, the statistics of the blocks become those of the data, over all batches with equal weights, and
    γ and β are set such that eval mode is unchanged: ``γ = s·√(σ² + ε)`` and ``β = t + s·μ`` for ``s·x + t`` before.

    Args:
        model: any model; it is left untouched.
        block: from a convolution (a copy of it) to a new module of the same geometry, or None if there is none.
        where: ``(name, conv) -> bool``, which convolutions to expand; default: all whose kernel is larger than 1.
        data: a batch (N, C, H, W) as the model takes it, or an iterable of batches, or of tuples that start with one.

    Returns:
        The expanded model, new, sharing nothing with the input, in its dtype, device and modes; and the report.
        A convolution that is registered in several places becomes one block in all of them.

    Raises:
        ReparamError: the model cannot be copied.
        UsageError: ``data`` has no batches, or they are not tensors.

    Warns:
        NothingExpandedWarning: no convolution got a block; the result is a copy.

    Limits: a convolution whose kernel is zero, or tiny compared with the other branches, stays. In half precision the
    dense kernel is rounded relative to an identity of size 1: see ``error`` in the report. The random states of PyTorch
    are restored, so the branches depend on the seed alone. Of a model wrapped by torch.compile, pass the model inside.
    Hooks on the model run on ``data``.

    Source: Ding et al., CVPR 2021, Eq. 3 and 4, solved for the kernel of the largest branch.
    """
    check_model(model, "expand", lazy=True)
    return _replace_with_blocks(model, block, where, data, allow_fresh=False)


def replace_convs(
    model: nn.Module, block: str | MakeBlock, *, where: Where | None = None, data: Data | None = None
) -> tuple[nn.Module, ExpandReport]:
    """Replace each convolution by a block of the table, computing the same function where the block allows it.

    Like :func:`expand`, which documents the other arguments, results, errors and limits, with two differences: the
    block is given by its name, and one that cannot start out equal to its convolution starts with new random values, to
    be trained. ``report.is_exact`` and the ``fresh`` of its entries tell where and why: DiracNet's kernel is normalized
    and ExpandNet's is a product, so neither is affine in the kernel of a convolution inside, which is what is solved
    for; a block with ReLUs in its branches is no convolution. A batch norm after a convolution stays after the block.

    Args:
        model: any model; it is left untouched.
        block: a name of :data:`repvgg.blocks.BLOCKS`, such as "dbb", or a function as :func:`expand` takes it.
        where: ``(name, conv) -> bool``, which convolutions to replace; default: all whose kernel is larger than 1.
        data: see :func:`expand`.

    Raises:
        UsageError: there is no such block; also see :func:`expand`.

    Warns:
        FreshWeightsWarning: some blocks start with new values, and the model computes another function.
    """
    check_model(model, "replace_convs")
    # Resolved before any work, so that a wrong name fails at once.
    make = _block_by_name(block) if isinstance(block, str) else block
    out, report = _replace_with_blocks(model, make, where, data, allow_fresh=True)
    fresh = [entry for entry in report.expanded if entry.fresh]
    if fresh:
        warnings.warn(
            f"{len(fresh)} of {len(report.expanded)} blocks start with new values, so the model computes another "
            f"function until it is trained: {fresh[0].fresh}.",
            FreshWeightsWarning,
            stacklevel=2,
        )
    return out, report


def insert_bn(model: nn.Module, data: Data, *, where: Where | None = None) -> tuple[nn.Module, ExpandReport]:
    """Insert a batch norm after each convolution of a plain model, without changing what the model computes.

    For continuing to train the plain form: with μ and σ² the mean and variance of each output channel of the
    convolution on ``data``, the batch norm gets ``running_mean = μ``, ``running_var = σ²``, ``γ = √(σ² + ε)`` and
    ``β = μ``. It is the identity in eval mode, and also in training mode on the same data. ``repvgg.reparameterize``
    folds it back.

    Each convolution, bias included, becomes the ``conv`` of a :class:`repvgg.blocks.ConvBN`, next to the new ``bn``.

    Args:
        model: any model, run on ``data`` in eval mode; it is left untouched.
        data: a batch (N, C, H, W) as the model takes it, or an iterable of batches, or of tuples that start with one.
        where: ``(name, conv) -> bool``, after which convolutions; default: all.

    Returns:
        The new model, sharing nothing with the input, in its dtype, device and modes; and the report.

    Raises:
        ReparamError: the model cannot be copied.
        UsageError: ``data`` has no batches, or they are not tensors.

    Warns:
        NothingExpandedWarning: no convolution got a batch norm; the result is a copy.

    Limits: a bias before a batch norm gets no gradient in training mode; β takes its role. Convolutions that a
    batch norm follows already are skipped. Hooks on the model run on ``data``.
    """
    check_model(model, "insert_bn")
    with isolated_eval():
        out = deep_copy(model)
        expansion = _Expansion(model, out)
        sites = expansion.select(where or (lambda *_: True), _why_not_selected(where))
        for site, outputs in output_statistics(out, sites, data).items():
            expansion.append_norm(site, outputs)
        out = replace_modules(out, expansion.made)
    return out, expansion.report(stacklevel=3)


def _replace_with_blocks(
    model: nn.Module, make: MakeBlock, where: Where | None, data: Data | None, *, allow_fresh: bool
) -> tuple[nn.Module, ExpandReport]:
    with isolated_eval():
        out = deep_copy(model)
        expansion = _Expansion(model, out)
        owners = count_owners(out)
        for site in expansion.select(where or (lambda _, conv: max(conv.kernel_size) > 1), _why_not_selected(where)):
            expansion.try_block(site, make, owners, allow_fresh=allow_fresh)
        out = replace_modules(out, expansion.made)
        if data is not None:
            out = expansion.calibrate(out, data)
    return out, expansion.report(stacklevel=4)


def _block_by_name(name: str) -> MakeBlock:
    entry = block_of(name)
    return lambda conv: entry.make(Geometry.of(conv))


def _why_not_selected(where: Where | None) -> str:
    return "its kernel is 1x1: select it with where=" if where is None else "where= leaves it out"


class _Expansion:
    """One expansion of a copy of a model: what replaces which convolution, and why the others stay.

    Attributes:
        made: what replaces a convolution.
        errors: for these, the difference from the convolution; None if the block starts with new values.
        fresh: for the latter, why.
        reasons: for all other convolutions, why they stay.
    """

    def __init__(self, original: nn.Module, model: nn.Module) -> None:
        self.originals = dict(original.named_modules(remove_duplicate=False))
        self.sites = find_sites(model)
        self.models = (original, model)
        self.made: dict[nn.Module, nn.Module] = {}
        self.errors: dict[nn.Module, float | None] = {}
        self.fresh: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}

    def select(self, where: Where, otherwise: str) -> list[Site]:
        """Return the convolutions that ``where`` selects and that may be replaced."""
        wanted = [site for site in self.sites if where(site.names[0], self._original(site))]
        self.reasons.update({s.conv: otherwise for s in self.sites if s not in wanted})
        self.reasons.update({s.conv: s.refusal for s in wanted if s.refusal})
        return [site for site in wanted if not site.refusal]

    def _original(self, site: Site) -> nn.Conv2d:
        # ``where`` sees the user's own module, which it may compare by identity.
        found = self.originals.get(site.names[0])
        return found if isinstance(found, nn.Conv2d) else site.conv

    def try_block(self, site: Site, make: MakeBlock, owners: Mapping[int, int], *, allow_fresh: bool) -> None:
        """Make the block of one convolution, or record why not; with ``allow_fresh``, it may start with new values."""
        reason = why_not_replaceable(site.conv, owners)
        if reason:
            self.reasons[site.conv] = reason
            return
        try:
            block = self._make_block(site.conv, make)
        except (ReparamError, UsageError) as error:
            self.reasons[site.conv] = _as_reason(error)
            return
        try:
            self.errors[site.conv] = solve_block(block, site.conv)
        except (ReparamError, UsageError) as error:
            (self.fresh if allow_fresh else self.reasons)[site.conv] = _as_reason(error)
            if not allow_fresh:
                return
            # The failed attempt has overwritten the initial values.
            block, self.errors[site.conv] = self._make_block(site.conv, make), None
        self.made[site.conv] = block

    def _make_block(self, conv: nn.Conv2d, make: MakeBlock) -> nn.Module:
        """Return a new block; raise ReparamError if it shares a tensor with the model or with another block."""
        block = make_block(conv, make)
        # solve_block writes into the block's parameters, which nothing else may see.
        taken = {id(tensor) for other in (*self.models, *self.made.values()) for tensor in _tensors(other)}
        if any(id(tensor) in taken for tensor in _tensors(block)):
            raise ReparamError("its block shares tensors with the model, or with the block of another convolution")
        return match_conv(block, conv)

    def calibrate(self, out: nn.Module, data: Data) -> nn.Module:
        """Set the statistics in all blocks to those of ``data``, and solve again, as new γ and β were rounded."""
        # Only those of new blocks: existing batch norms keep the statistics they were trained with.
        norms = [part for block in self.made.values() for part in block.modules() if has_statistics(part)]
        seen = input_statistics(out, cast("list[_BatchNorm]", norms), data)
        for norm, statistics in seen.items():
            set_statistics(cast("_BatchNorm", norm), statistics, *scale_and_shift(cast("_BatchNorm", norm)))
        undone: dict[nn.Module, nn.Module] = {}
        for site in self.sites:
            if site.conv not in self.made or site.conv in self.fresh:
                continue
            try:
                self.errors[site.conv] = solve_block(self.made[site.conv], site.conv)
            except (ReparamError, UsageError) as error:
                self.reasons[site.conv] = f"with the statistics of the data, {_as_reason(error)}"
                undone[self.made.pop(site.conv)] = site.conv
        return replace_modules(out, undone)

    def append_norm(self, site: Site, outputs: OutputStatistics) -> None:
        """Wrap one convolution with the batch norm that leaves its outputs unchanged."""
        norm = nn.BatchNorm2d(site.conv.out_channels)
        match_conv(norm, site.conv)
        # float64: the statistics are, and γ and β are rounded once.
        one_C = torch.ones(norm.num_features, dtype=torch.float64)
        if outputs.refusal:
            self.reasons[site.conv] = outputs.refusal
        elif not set_statistics(norm, outputs.statistics, one_C, one_C * 0):
            self.reasons[site.conv] = f"its output on the data does not fit into {norm.weight.dtype}"
        else:
            with eval_mode(norm):
                error = max_difference(trace(norm), ConvMap.identity(norm.num_features))
            wrapped = ConvBN(site.conv, norm)
            # ConvBN starts in training mode, like every new module.
            wrapped.training = site.conv.training
            self.made[site.conv], self.errors[site.conv] = wrapped, error

    def report(self, stacklevel: int) -> ExpandReport:
        """Return an entry for every convolution, in the order of the model; warn if none was expanded."""
        expanded = tuple(self._entry(site) for site in self.sites if site.conv in self.made)
        left = tuple(Skipped(s.names[0], self.reasons[s.conv]) for s in self.sites if s.conv not in self.made)
        if not expanded:
            why = f": {left[0].name or 'the model'} stays, because {left[0].reason}" if left else ": there is none"
            warnings.warn(f"No convolution was expanded{why}.", NothingExpandedWarning, stacklevel=stacklevel)
        return ExpandReport(expanded, left)

    def _entry(self, site: Site) -> Expanded:
        before, after = (sum(p.numel() for p in m.parameters()) for m in (site.conv, self.made[site.conv]))
        return Expanded(
            name=site.names[0],
            also=site.names[1:],
            convolution=f"Conv2d({site.conv.extra_repr()})",  # type: ignore[no-untyped-call]
            parameters_before=before,
            parameters_after=after,
            error=self.errors[site.conv],
            fresh=self.fresh.get(site.conv, ""),
        )


def _as_reason(error: Exception) -> str:
    return str(error).rstrip(".")  # it continues a sentence


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
