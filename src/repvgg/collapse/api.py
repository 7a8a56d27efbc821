"""The public functions: collapse a model, fold only its batch norms, check whether it is plain.

A collapse takes these steps, in modules of this package:

1. **Record** a call (``record``) of a structural copy of the model (``instrument``); ``calls`` makes up calls, and
   ``effects`` finds what a call leaves behind. The result is a ``Recording``: a flat graph, and the calls of modules.
2. **Search** it for linear regions (``regions``): the function that each node is of an earlier one (``symbolic_eval``),
   cut where memory is overwritten (``alias``) or merging does not pay (``cost``); then parts of sums (``sums``), and
   norms that several convolutions absorb (``absorb``).
3. **Place** the convolution of each region (``placement``, ``insertion``), if the result holds in other calls as well
   (``validity``): ``variants`` records them, ``matching`` compares them, ``settings`` and ``code`` say what the code
   reads. ``removal`` finds modules that the plain model does without. Steps 1 to 3 make a ``Plan`` (``plan``).
4. **Rewrite** (``rewrite``): compute the convolution (``solution``, ``plain_conv``), write new forwards
   (``graph_rewriter``, ``emit``), add the checks of the plain model (``guard``).
5. **Verify** each region and the model (``proof``), and the forwards that stay (``consistency``). What fails is
   excluded, and steps 1 to 5 are repeated; so they are where a region was cut, as more may merge in the result.
6. **Report** (``report``).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd

from repvgg._arguments import check_model
from repvgg._calls import Call, bind
from repvgg._calls import Inputs as GivenInputs
from repvgg._contexts import gc_paused
from repvgg.collapse.consistency import find_dependents
from repvgg.collapse.cost import Cost, cheaper, policy_of
from repvgg.collapse.graph_rewriter import copies_of_computed_tensors, deep_copy
from repvgg.collapse.modules import (
    batch_norms,
    is_inside,
    norms_in_graphs,
    preserved_random_state,
    submodule_or_none,
    unwrapped,
)
from repvgg.collapse.plan import Options, Plan, Reasons, make_plan
from repvgg.collapse.proof import NOT_PROVEN, Proof, prove_module
from repvgg.collapse.recording import Recording
from repvgg.collapse.report import Replaced, Report, Skipped, join_passes
from repvgg.collapse.rewrite import Applied, apply_plan
from repvgg.errors import EquivalenceError, NothingFoldedWarning
from repvgg.symbolic import check_eval_mode, first_float

Inputs: TypeAlias = GivenInputs | None

_UNREAD = "it is computed, but no output depends on the result"
_NAMES_SHOWN = 5  # in a summary


def reparameterize(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    policy: Literal["cheaper", "always"] | Callable[[Cost, Cost], bool] = "cheaper",
    prove: bool = True,
) -> tuple[nn.Module, Report]:
    """Turn a trained multi-branch model into a plain one that computes the same function in eval mode.

    Every maximal linear region of the model, across module boundaries (parallel branches of convolutions, batch norms,
    identities, scales, pools, and chains of them), is replaced by one convolution. Its kernel and bias are derived from
    the model's own ``forward`` in float64 and cast once. Nothing is assumed about names or classes: the model is run
    on a copy that shares its parameters, and what it does is recorded, whatever the Python code in between is. A chain
    of modules merges into its first convolution, and no forward changes; where branches meet, the innermost module
    around them gets a new forward, and keeps its class, methods and attributes. A public method that uses a merged part
    is refused with a UsageError. Submodules that only the training forward calls, or with ``inputs`` nothing calls, and
    that nothing else can reach, are dropped. So are those on whose results no output depends: a stand-in of the same
    shape takes their place.

    With ``inputs``, what holds for calls like this one is merged. Where another argument would select something else,
    the plain model checks it in each call and refuses a call that differs with a UsageError. So it does, with or
    without ``inputs``, for attributes, configurations, global and closure variables that a forward reads and may branch
    on; ``report.guards`` lists these checks. Without ``inputs``, they are made up, and only what holds for other calls
    as well is merged: branches on sizes and on optional arguments are tried.

    Args:
        model: any module in eval mode; it is left untouched. A wrapper of DataParallel, DistributedDataParallel or
            torch.compile is removed.
        inputs: how the model is called: a tensor, a sequence of arguments, or a mapping of arguments by name, of any
            structure. The proof of the whole model runs on them; of large images it takes a part, if a recording shows
            that the model does the same on that. Without inputs, both run on made-up ones.
        policy: which merges pay. "cheaper": all that increase neither multiply-adds nor weights; parallel branches
            never do. "always": all. Or a function of the costs before and after.
        prove: compare each region with its convolution in float64, and the whole model at the end. What is not proved
            equal stays unchanged, and the report says so.

    Returns:
        The plain model, new, sharing no tensor with the input, in the input's dtype, device and memory format; all
        parameters outside the regions are bit-identical copies. And the report of what was folded, skipped and dropped.

    Raises:
        TrainingModeError: a batch norm or a dropout is in training mode; the text names it.
        EquivalenceError: every region is proved equal to its convolution, but the models as a whole differ.
        ReparamError: an attribute of the model cannot be copied; the text names it.

    Warns:
        NothingFoldedWarning: there was nothing to fold; the result is a copy.

    Limits: a model that takes both batches and single images without a batch axis is collapsed for batches, unless
    ``inputs`` are single images: a batch norm works on another axis there. Code that reads tensors without PyTorch's
    functions cannot be recorded; what it may have read stays. Numbers that are attributes are constants, as weights
    are, unless the code branches on them. Environment variables, files and clocks that a forward asks for are not seen.
    Only eval mode is preserved.
    """
    return _collapse(model, Options(True, policy_of(policy), _call(model, inputs)), prove)


def fold_batch_norms(model: nn.Module, inputs: Inputs = None, *, prove: bool = True) -> tuple[nn.Module, Report]:
    """Fold every batch norm into the convolution before it, and leave branches as branches.

    This is what deployment tools do, and how the paper folds its baselines (§4.1, Eq. 3). For arguments, errors and
    warnings, see :func:`reparameterize`, which merges branches as well.
    """
    return _collapse(model, Options(False, cheaper, _call(model, inputs)), prove)


def is_plain(model: nn.Module, inputs: Inputs = None) -> bool:
    """Whether a model is converted: it has no batch norm and no linear region that could be merged.

    The mode of the model does not matter. A plain model may still have branches that no convolution equals, such as
    the residual additions of a ResNet. :func:`model_summary` lists what is left, and takes the same arguments.
    """
    check_model(model, "is_plain")
    return model_summary(model, inputs).is_plain


def _call(model: nn.Module, inputs: Inputs) -> Call | None:
    return None if inputs is None or not isinstance(model, nn.Module) else bind(unwrapped(model), inputs)


@dataclass(eq=False)
class _Result:
    """The result of the passes so far.

    Attributes:
        plan: the plan of the first pass.
        plain: the model after the last pass.
        replaced: what all passes together replaced.
    """

    plan: Plan
    plain: nn.Module
    replaced: list[Replaced]


def _collapse(model: nn.Module, options: Options, prove: bool) -> tuple[nn.Module, Report]:
    """Plan, apply, verify; exclude what failed and repeat, until everything that was replaced is verified."""
    check_model(model, "reparameterize", lazy=True)
    model = given = unwrapped(model)
    check_eval_mode(model)  # before anything is planned: the error names the module
    like = first_float(model)
    prove = prove and (like is None or not like.is_meta)  # a model without values cannot be run
    excluded: Reasons = {}
    result: _Result | None = None
    current, current_excluded = model, excluded
    known: tuple[Recording, Call] | None = None  # a recording of the current model
    whole = NOT_PROVEN
    with preserved_random_state(), gc_paused():
        while True:
            plan = make_plan(current, options, current_excluded, known)
            if current is given and any(scope.recording.writes_parameters for scope in plan.scopes):
                # Each call would change the parameters of the user, in the proofs as well.
                model = current = deep_copy(model, copies_of_computed_tensors(model), model)
                continue
            if result is not None and plan.is_empty:
                applied = Applied(result.plain, (), {})
            else:
                applied = apply_plan(current, plan, prove=prove, take_tensors=current is not model)
            failed, known = applied.failed, None
            if not failed:
                failed, known = find_dependents(plan, applied.plain)
            if failed.keys() - current_excluded.keys():
                current_excluded |= failed
                known = plan.known
                continue

            is_first = result is None
            if result is None:
                result = _Result(plan, applied.plain, list(applied.replaced))
            elif applied.replaced:
                replaced = join_passes(result.replaced, applied.replaced)
                result = _Result(result.plan, applied.plain, replaced)
            # Where to cut a region is a greedy choice, so there may be more to merge in the result.
            if plan.may_leave_more and (is_first or applied.replaced):
                current, current_excluded = applied.plain, _transfer(model, excluded, applied.plain)
                continue

            # Release the copies of the model that later passes made: the proof makes its own copies.
            current, current_excluded, known = model, excluded, None
            del applied
            whole = NOT_PROVEN
            if prove and not result.plan.is_empty:
                _, call = result.plan.known or (None, None)
                whole = prove_module(model, result.plain, options.call or call, result.plan.cropped(options.call))
            failed = _find_unequal_hosts(model, result, whole, excluded) if prove else {}
            if not failed.keys() - excluded.keys():
                break
            excluded |= failed
            # A module of the original was excluded, so the results of all passes are invalid.
            result = None

    report = Report(
        folded=tuple(replaced.entry for replaced in result.replaced),
        left=_skipped(model, result, excluded),
        dropped=(*result.plan.dropped, *(Skipped(path, _UNREAD) for path in result.plan.unread())),
        proof=whole.text,
        in_pieces=tuple(result.plan.untraced),
        guards=tuple(result.plan.guards()),
    )
    if not result.replaced:
        warnings.warn(_why_nothing(report), NothingFoldedWarning, stacklevel=3)
    return result.plain, report


def _why_nothing(report: Report) -> str:
    if report.number_with_inputs:
        return f"Nothing was folded: {report.number_with_inputs} parts may fold with inputs= (see the report)."
    if report.left:
        return f"Nothing was folded: {report.left[0].name or 'the model'} stays because {report.left[0].reason}."
    if report.in_pieces:
        return f"Nothing was folded: {report.in_pieces[0].reason}."
    return "Nothing was folded: there is no linear region of more than one operation in this model."


def _transfer(model: nn.Module, excluded: Reasons, plain: nn.Module) -> Reasons:
    """Map excluded modules of the original to the modules at the same paths of the result."""
    reasons = {name: excluded[part] for name, part in model.named_modules() if part in excluded}
    parts = ((submodule_or_none(plain, name), reason) for name, reason in reasons.items())
    return {part: reason for part, reason in parts if part is not None}


def _find_unequal_hosts(model: nn.Module, result: _Result, whole: Proof, excluded: Reasons) -> Reasons:
    """If the models as a whole differ, or cannot be run, find the modules whose new forward is not equal.

    Raises EquivalenceError if the models differ and no new forward is the cause.
    """
    if whole.ran and not whole.failure:
        return {}
    found: Reasons = {}
    # Only new forwards can be wrong here: each region was compared with its convolution when it was made.
    for path, call in result.plan.rewritten_hosts():
        old, new = model.get_submodule(path), submodule_or_none(result.plain, path)
        if new is None:
            continue
        proof = whole if old is model else prove_module(old, new, call)
        if proof.failure:
            found[old] = f"its new forward is not equal to the old one: {proof.failure}"
    if whole.failure:
        reason = f"without it the model is not equal: {whole.failure}"
        found |= {model.get_submodule(path): reason for path in result.plan.unread()}
    if whole.failure and not found.keys() - excluded.keys():
        raise EquivalenceError(
            f"The plain model is not equal to the model ({whole.failure}), though each of its regions is: please "
            "report this model. With prove=False nothing is compared."
        )
    return found


def _skipped(model: nn.Module, result: _Result, excluded: Reasons) -> tuple[Skipped, ...]:
    """List batch norms that remain, modules that could not be traced, and modules that failed verification."""
    surviving = {name for name, _ in batch_norms(result.plain)}
    norms = [Skipped(name, result.plan.reason(name)) for name, m in batch_norms(model) if name in surviving]
    skipped = norms
    for name, part in model.named_modules():
        reason = excluded.get(part)
        # One entry per cause: a failed region would otherwise be listed again for each module inside it.
        if reason and not any(is_inside(skip.name, name) or reason in skip.reason for skip in skipped):
            skipped.append(Skipped(name, reason))
    return tuple(skipped)


@dataclass(frozen=True)
class ModelSummary:
    """What :func:`model_summary` found.

    Attributes:
        parameters: number of trainable and frozen parameters.
        convolutions: number of each kind, such as ``{"3x3": 22}``; linear layers are "linear".
        batch_norms: paths of the batch norms.
        mergeable: paths of what could be merged: the first part of each linear region of more than one operation.
    """

    parameters: int
    convolutions: dict[str, int]
    batch_norms: tuple[str, ...]
    mergeable: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the model is converted: no batch norm and nothing to merge is left."""
        return not self.batch_norms and not self.mergeable

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain data, for JSON."""
        return {**asdict(self), "is_plain": self.is_plain}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "converted: a plain network" if self.is_plain else "not converted: call repvgg.reparameterize"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.convolutions.items())
        yield f"  {self.parameters:,} parameters; convolutions: {kinds or 'none'}"
        for title, names in (("regions to merge", self.mergeable), ("batch norms", self.batch_norms)):
            if names:
                more = len(names) - _NAMES_SHOWN
                rest = f" and {more} more" if more > 0 else ""
                yield f"  {len(names)} {title}: {', '.join(name or '(root)' for name in names[:_NAMES_SHOWN])}{rest}"


def model_summary(model: nn.Module, inputs: Inputs = None) -> ModelSummary:
    """Report whether a model is converted, and if not, what is left to do.

    Nothing is computed with the weights, and the mode of the model does not matter. Batch norms without a convolution
    next to them stay when :func:`repvgg.reparameterize` is called; its report gives the reason.

    Args:
        model: any module.
        inputs: one or several tensors that the model takes: they determine shapes that its functions leave open.
    """
    check_model(model, "model_summary")
    model = unwrapped(model)
    with gc_paused():
        plan = make_plan(model, Options(True, cheaper, _call(model, inputs)), {})
    kinds = Counter(_kind(part) for part in model.modules() if isinstance(part, (_ConvNd, nn.Linear)))
    return ModelSummary(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        convolutions=dict(kinds.most_common()),
        batch_norms=(*(name for name, _ in batch_norms(model)), *norms_in_graphs(model), *plan.norm_functions()),
        mergeable=tuple(plan.first_convolutions()),
    )


def _kind(part: nn.Module) -> str:
    if not isinstance(part, _ConvNd):
        return "linear"
    size = "x".join(map(str, part.kernel_size))
    return f"{size} transposed" if part.transposed else size
