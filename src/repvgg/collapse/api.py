"""The verbs: collapse a model, fold only its batch norms, ask whether it is plain."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from repvgg.collapse.capture import batch_norms, join, random_state_kept, unwrap
from repvgg.collapse.cost import CHEAPER, Cost, Policy
from repvgg.collapse.plan import Plan, make_plan
from repvgg.collapse.proof import Proof, depends_on_its_parts, part_at, prove_module
from repvgg.collapse.report import LeftAlone, Replaced, Report, joined
from repvgg.collapse.rewrite import Outcome, carry_out
from repvgg.collapse.symbolic_eval import Expected
from repvgg.errors import EquivalenceError, NothingFoldedWarning
from repvgg._contexts import gc_paused
from repvgg.symbolic import first_float, refuse_training

Inputs: TypeAlias = Tensor | Sequence[Tensor] | None


def reparameterize(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    policy: Literal["cheaper", "always"] | Callable[[Cost, Cost], bool] = "cheaper",
    prove: bool = True,
) -> tuple[nn.Module, Report]:
    """Turn a trained multi-branch model into a plain one that computes the same function in eval mode.

    Every maximal linear region of the model, across the borders of its modules (parallel branches of convolutions,
    batch norms, identities, scales, pools, and chains of them), is replaced by one convolution; its kernel and bias are
    read off the model's own ``forward`` in float64 and cast once. Nothing is assumed about names or classes. Where a
    forward cannot be traced, the largest modules in it that can be are looked at, each on its own. A path of modules is
    merged into the first convolution of it, and all forwards stay as they are; where branches meet, the innermost
    module around them gets a new forward. Submodules that only the training forward calls, and nothing else can reach,
    are dropped.

    Args:
        model: any module in eval mode; it is left untouched. A wrapper of DataParallel, DistributedDataParallel or
            torch.compile is looked through.
        inputs: a tensor, or several, to run the model on: the proof of the whole is made on them, and shapes are read
            off that run. Without them both are tried on images made up for the purpose.
        policy: which merged regions pay. "cheaper": those that cost no more multiply-adds and no more weights than
            their parts, which parallel branches never do. "always": all. Or a function of the two costs, before and
            after.
        prove: judge each region against its convolution in float64 as it is replaced, and the whole at the end. What
            does not prove equal stays as it was, and the report says so.

    Returns:
        The plain model, new, sharing no tensor with the input, with the input's dtype, device and memory format; all
        parameters outside the regions are bit-identical copies. And the report of what was folded, left and dropped.

    Raises:
        TrainingModeError: a batch norm or a dropout is in training mode; the text names it.
        EquivalenceError: every region proves equal to its convolution, and the models as a whole differ.
        ReparamError: an attribute of the model cannot be copied; the text names it.

    Warns:
        NothingFoldedWarning: there was nothing to fold; the outcome is a copy.

    Limits: a model that takes both batches and single images without a batch axis is collapsed for batches, unless
    ``inputs`` say otherwise: there a norm works on another axis. What a forward does with its parts is seen for the
    defaults of its optional arguments and for a few other values, and for eval mode only.
    """
    return _Conversion(model, True, Policy.of(policy), prove, inputs).outcome()


def fold_batch_norms(model: nn.Module, inputs: Inputs = None, *, prove: bool = True) -> tuple[nn.Module, Report]:
    """Fold every batch norm into the convolution in front of it, and leave branches as branches.

    What deployment tools do on their own; the paper folds its baselines this way (§4.1, Eq. 3). See
    :func:`reparameterize`, whose outcome is plainer still, for arguments, errors and warnings.
    """
    return _Conversion(model, False, CHEAPER, prove, inputs).outcome()


def is_plain(model: nn.Module, inputs: Inputs = None) -> bool:
    """Whether a model is converted: no batch norm is left in it, and no linear region that could be merged.

    The mode of the model does not matter. A plain model may still have branches that no convolution equals, such as
    the residual additions of a ResNet. :func:`model_summary` says what is left, and takes the same arguments.
    """
    return model_summary(model, inputs).is_plain


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only change how it runs."""
    return unwrap(model)[0]


class _Conversion:
    """One conversion: plan, carry out, prove; and again without whatever did not stand the test."""

    def __init__(self, model: nn.Module, merge_branches: bool, policy: Policy, prove: bool, inputs: Inputs) -> None:
        self.model = unwrapped(model)
        like = first_float(self.model)
        self.prove = prove and (like is None or not like.is_meta)  # there is nothing to run without values
        self.merge_branches, self.policy = merge_branches, policy
        self.inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        self.kept: dict[int, str] = {}
        self.expected: tuple[Expected | None, ...] = ()

    def outcome(self) -> tuple[nn.Module, Report]:
        """The plain model and the report."""
        refuse_training(self.model)
        with random_state_kept(), gc_paused():
            while True:
                plan, done = self._round(self.model, self.kept)
                plain, replaced = self._more_rounds(plan, done)
                whole = self._prove_whole(plan, plain)
                more = self._unequal_hosts(plan, plain, whole)
                if more.keys() <= self.kept.keys():
                    break
                self.kept |= more
        if not replaced:
            warnings.warn(
                "Nothing was folded: there is no linear region of more than one operation in this model.",
                NothingFoldedWarning,
                stacklevel=3,
            )
        left = _left(self.model, plain, plan, self.kept)
        return plain, Report(
            tuple(done.row for done in replaced), left, _dropped(plan), whole.text, tuple(plan.untraced)
        )

    def _round(self, model: nn.Module, kept: dict[int, str]) -> tuple[Plan, Outcome]:
        """Plan and carry out, until nothing has to stay that was not ``kept`` before."""
        while True:
            plan = make_plan(model, self.merge_branches, self.policy, kept, self.inputs)
            done = carry_out(model, plan, prove=self.prove)
            more = done.refused or depends_on_its_parts(model, done.plain, plan, kept)
            if more.keys() <= kept.keys():
                return plan, done
            kept |= more

    def _more_rounds(self, plan: Plan, done: Outcome) -> tuple[nn.Module, list[Replaced]]:
        """Look again at what regions that were cut have become; a cut is a choice, and not always the best."""
        plain, replaced = done.plain, list(done.replaced)
        while plan.may_leave_more:
            plan, done = self._round(plain, self._kept_in(plain))
            if not done.replaced:
                break
            plain, replaced = done.plain, joined(replaced, done.replaced)
        return plain, replaced

    def _kept_in(self, plain: nn.Module) -> dict[int, str]:
        """What stands in the outcome for the modules that have to stay."""
        names = {name: self.kept[id(part)] for name, part in self.model.named_modules() if id(part) in self.kept}
        parts = ((part_at(plain, name), reason) for name, reason in names.items())
        return {id(part): reason for part, reason in parts if part is not None}

    def _prove_whole(self, plan: Plan, plain: nn.Module) -> Proof:
        if not self.prove or plan.empty:
            return Proof(None, "", ran=False)
        if None not in plan.inputs():  # once something has to stay, it may not be told any more
            self.expected = self.expected or plan.inputs()
        return prove_module(self.model, plain, self.expected or plan.inputs(), self.inputs)

    def _unequal_hosts(self, plan: Plan, plain: nn.Module, whole: Proof) -> dict[int, str]:
        """The modules with a new forward that do another thing than before, where the whole does, or cannot be run.

        Raises:
            EquivalenceError: the whole does, and none of them.
        """
        found: dict[int, str] = {}
        if not self.prove or (whole.ran and not whole.failure):
            return found
        for path, expected in plan.hosts():
            old, new = self.model.get_submodule(path), part_at(plain, path)
            if new is None:
                continue
            proof = whole if old is self.model else prove_module(old, new, expected)
            if proof.failure:
                found[id(old)] = f"its new forward does not prove equal to the old one: {proof.failure}"
        if whole.failure and not found.keys() - self.kept.keys():
            raise EquivalenceError(
                f"The plain model is not equal to the model ({whole.failure}), though each of its regions is: please "
                "report this model. With prove=False nothing is judged."
            )
        return found


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


_SHOWN = 5


@dataclass(frozen=True)
class ModelSummary:
    """What :func:`model_summary` found.

    Attributes:
        parameters: how many numbers are trained.
        convolutions: how many of each kind, such as ``{"3x3": 22}``; linear layers are "linear".
        batch_norms: paths of the batch norms.
        mergeable: paths of what could be merged: the first part of each linear region of more than one operation.
    """

    parameters: int
    convolutions: dict[str, int]
    batch_norms: tuple[str, ...]
    mergeable: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is converted: no batch norm and nothing to merge is left."""
        return not self.batch_norms and not self.mergeable

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data, for JSON."""
        return {**asdict(self), "is_plain": self.is_plain}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "converted: a plain network" if self.is_plain else "not converted: call repvgg.reparameterize"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.convolutions.items())
        yield f"  {self.parameters:,} parameters; convolutions: {kinds or 'none'}"
        for title, names in (("regions to merge", self.mergeable), ("batch norms", self.batch_norms)):
            if names:
                more = len(names) - _SHOWN
                rest = f" and {more} more" if more > 0 else ""
                yield f"  {len(names)} {title}: {', '.join(name or '(root)' for name in names[:_SHOWN])}{rest}"


def model_summary(model: nn.Module, inputs: Tensor | Sequence[Tensor] | None = None) -> ModelSummary:
    """Answer whether a model is converted, and if not, what is left to do.

    Nothing is computed with the weights, and the mode of the model does not matter. Batch norms that no convolution is
    next to stay when :func:`repvgg.reparameterize` is called; its report says why.

    Args:
        model: any module.
        inputs: a tensor, or several, that the model takes: shapes are read off them where its functions do not tell.
    """
    model = unwrap(model)[0]
    with random_state_kept(), gc_paused():
        plan = make_plan(model, merge_branches=True, inputs=[inputs] if isinstance(inputs, Tensor) else inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norms = tuple(name for name, _ in batch_norms(model))
    kinds = Counter(_kind(part) for part in model.modules() if isinstance(part, (_ConvNd, nn.Linear)))
    return ModelSummary(parameters, dict(kinds.most_common()), norms, tuple(_mergeable(plan)))


def _kind(part: nn.Module) -> str:
    if not isinstance(part, _ConvNd):
        return "linear"
    size = "x".join(map(str, part.kernel_size))
    return f"{size} transposed" if part.transposed else size


def _mergeable(plan: Plan) -> Iterator[str]:
    yield from (whole.path for whole in plan.wholes)
    for unit in plan.units:
        for region, _ in (*unit.regions.found, *unit.regions.scaled):
            node = region.first_convolution
            inner = str(node.target) if node.op == "call_module" else region.flat.owner(node)
            yield join(unit.path, inner)
