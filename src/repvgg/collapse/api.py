"""The verbs: collapse a model, fold only its batch norms, ask whether it is plain."""

from __future__ import annotations

import warnings

from torch import nn

from repvgg.collapse.check import depends_on_its_parts
from repvgg.collapse.cost import CHEAPER
from repvgg.collapse.modules import batch_norms, unwrap
from repvgg.collapse.plan import Plan, make_plan
from repvgg.collapse.report import LeftAlone, Report
from repvgg.collapse.rewrite import carry_out
from repvgg.collapse.tracing import collector_paused, random_state_kept
from repvgg.errors import NothingFoldedWarning
from repvgg.symbolic import refuse_training


def reparameterize(model: nn.Module) -> tuple[nn.Module, Report]:
    """Turn a trained multi-branch model into a plain one that computes the same function in eval mode.

    Every linear region of a module's own ``forward`` (parallel branches of convolutions, batch norms, identities,
    scales, pools, and chains of them) is replaced by one ``nn.Conv2d``; its kernel and bias are read off the forward
    in float64 and cast once. Nothing is assumed about names or classes. A region is merged only if that costs no more
    multiply-adds than its parts. Submodules that only the training forward calls, and nothing else can reach, are
    dropped. A module whose branches are merged gets a new forward, its own traced; the two are run side by side on
    small images, and where they differ the module stays as it is.

    Args:
        model: any module in eval mode; it is left untouched. A wrapper of DataParallel, DistributedDataParallel or
            torch.compile is looked through.

    Returns:
        The plain model, new, sharing no tensor with the input, with the input's dtype, device and memory format; all
        parameters outside the regions are bit-identical copies. And the report of what was folded, left and dropped.

    Raises:
        TrainingModeError: a batch norm or a dropout is in training mode; the text names it.
        ReparamError: an attribute of the model cannot be copied; the text names it.

    Warns:
        NothingFoldedWarning: there was nothing to fold; the outcome is a copy.
    """
    return _convert(model, merge_branches=True)


def fold_batch_norms(model: nn.Module) -> tuple[nn.Module, Report]:
    """Fold every batch norm into the convolution in front of it, and leave branches as branches.

    What deployment tools do on their own; the paper folds its baselines this way (§4.1, Eq. 3). See
    :func:`reparameterize`, whose outcome is plainer still, for arguments, errors and warnings.
    """
    return _convert(model, merge_branches=False)


def is_plain(model: nn.Module) -> bool:
    """Whether a model is converted: no batch norm is left in it, and no linear region that could be merged.

    The mode of the model does not matter. A plain model may still have branches that no convolution equals, such as
    the residual additions of a ResNet.
    """
    model = unwrapped(model)
    with random_state_kept():
        return not batch_norms(model) and make_plan(model, merge_branches=True).empty


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only change how it runs."""
    return unwrap(model)[0]


def _convert(model: nn.Module, merge_branches: bool) -> tuple[nn.Module, Report]:
    model = unwrapped(model)
    refuse_training(model)
    kept: dict[int, str] = {}
    with random_state_kept(), collector_paused():
        while True:
            plan = make_plan(model, merge_branches, CHEAPER, kept)
            done = carry_out(model, plan)
            more = done.refused or depends_on_its_parts(model, done.plain, plan, kept)
            if more.keys() <= kept.keys():
                break
            kept |= more
    if not done.folded:
        warnings.warn(
            "Nothing was folded: there is no linear region of more than one operation in this model.",
            NothingFoldedWarning,
            stacklevel=3,
        )
    return done.plain, Report(done.folded, _left(model, done.plain, plan, kept), _dropped(plan))


def _left(model: nn.Module, plain: nn.Module, plan: Plan, kept: dict[int, str]) -> tuple[LeftAlone, ...]:
    """Batch norms that survive, modules that could not be looked into, and those that did not stand the test."""
    surviving = {name for name, _ in batch_norms(plain)}
    norms = [LeftAlone(name, plan.reason(m)) for name, m in batch_norms(model) if name in surviving]
    untraced = [row for row in plan.untraced if any(_within(name, row.name) for name in surviving)]
    rows = [*norms, *untraced]
    for name, part in model.named_modules():
        reason = kept.get(id(part))
        if reason and not any(_within(row.name, name) or reason in row.reason for row in rows):
            rows.append(LeftAlone(name, reason))
    return tuple(rows)


def _within(inner: str, outer: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def _dropped(plan: Plan) -> tuple[LeftAlone, ...]:
    return tuple(LeftAlone(path, "the forward calls it in training mode only") for path in plan.dropped)
