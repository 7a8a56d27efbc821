"""One expansion: making what takes the place of each convolution, and keeping account of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repvgg._contexts import eval_mode
from repvgg.algebra import ConvMap
from repvgg.blocks import ConvBN
from repvgg.errors import NothingExpandedWarning, ReparamError, UsageError
from repvgg.expansion.branches import MakeBlock, block_for, like_conv
from repvgg.expansion.fitting import difference, fit
from repvgg.expansion.outputs import Outputs
from repvgg.expansion.report import Expanded, ExpandReport, Kept
from repvgg.expansion.sites import Site, Where, not_replaceable, replaced, sites_of
from repvgg.expansion.statistics import Data, has_statistics, input_statistics, map_of, take_on
from repvgg.symbolic import trace


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
