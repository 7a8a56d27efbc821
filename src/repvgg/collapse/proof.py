"""Proofs: what was replaced is run before and after, side by side, where the borders count.

A region is judged on its own in float64: the nodes as they were, against the one module that takes their place. All
that may differ is one rounding of each weight to the dtype of the model, and that is bounded exactly. The model as a
whole is judged as it will run, in its own dtype.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from repvgg.algebra import ConvMap
from repvgg.collapse.attribute_access import only_calls
from repvgg.collapse.capture import Capture, capture, has_hooks, hooks_of, is_plain_sequence
from repvgg.collapse.plan import Plan
from repvgg.collapse.symbolic_eval import Expected
from repvgg.errors import UsageError, typed_line
from repvgg.symbolic import Layout, algebra_device, first_float
from repvgg.verify import UNIT_ROUNDOFF, Evidence, border_inputs, judging, verify

NOT_RUN = "not run on its own"
_SIZES = ((4, 5), (9, 11), (37, 43), (224, 224))  # the larger ones for modules that shrink the first to nothing
_DEPTH = 6
_SENSITIVE = 64.0  # times what a rounding of the input does, which happens in each layer as well
_CHAOTIC = 1e-2
_FLOAT64 = 1e-11  # of the largest output: the algebra, and the region itself, in float64


@dataclass(frozen=True)
class Proof:
    """What came of it.

    Attributes:
        failure: why the two are not equal, or None.
        text: how equal they are, or why they could not be run.
        ran: whether they could.
    """

    failure: str | None
    text: str
    ran: bool = True


def prove_region(before: Callable[[Tensor], Tensor], image: Tensor, after: nn.Module) -> Proof:
    """Judge the module ``after`` against what it replaces.

    Every weight w of it may be off by the rounding to its dtype, u·|w|; so, with W its kernel and b its bias, the
    outputs may differ by at most ``u · max(|W| * |x| + |b|)``, and by what float64 itself rounds.

    Args:
        before: the region as it was, on float64.
        image: what to run both on, in float64.
        after: the module.
    """
    exact = copy.deepcopy(after)
    exact = exact.to(algebra_device(first_float(exact))).double()  # not every device has float64
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = before(image)
            tolerance = _FLOAT64 + _rounding(after, exact, image) / max(float(outcome.abs().max()), 1e-300)
            evidence = verify(lambda _: outcome, exact, image, tolerance=tolerance)
    except Exception as error:  # an operation that has no float64 on this device, or a stranger's code
        return Proof(f"it cannot be run on its own in float64 ({typed_line(error)})", "", ran=False)
    return _verdict(evidence)


def image_for(conv: ConvMap, layout: Layout) -> Tensor:
    """One small input on which every tap, every phase of the strides and every border counts."""
    if layout.rows:
        rows = border_inputs((4, conv.in_channels, 1, 1), batches=1, dtype=torch.float64)[0].flatten(1)
        return rows.view(*(1,) * ((layout.rank or 2) - 2), 4, conv.in_channels)
    sizes = [max(4, axis.reach + 2 * axis.stride - 2 * min(0, axis.before, axis.after)) for axis in conv.axes]
    sizes = [size + place for place, size in enumerate(sizes)]
    flat = border_inputs((1, conv.in_channels * math.prod(sizes[:-2]), *([1, *sizes][-2:])), batches=1)[0]
    return flat.double().view(1, conv.in_channels, *sizes)


def small_input(transposed: nn.Module) -> Tensor:
    """One small input of a transposed convolution."""
    weight: Any = transposed.weight
    sizes = [4 + place for place in range(weight.dim() - 2)]
    return image_for(ConvMap.identity(len(weight), spatial=len(sizes)), Layout(weight.dim())).reshape(1, -1, *sizes)


def _rounding(after: nn.Module, exact: nn.Module, image: Tensor) -> float:
    """The largest that one rounding of each weight may do to an output."""
    dtype = next(after.parameters()).dtype
    if dtype is torch.float64:
        return 0.0
    sizes = copy.deepcopy(exact)
    for parameter in sizes.parameters():
        parameter.copy_(parameter.abs_().clamp_min_(torch.finfo(dtype).smallest_normal))
    return float(UNIT_ROUNDOFF[dtype] * sizes(image.abs().to(parameter.device)).max())


def prove_module(
    old: nn.Module, new: nn.Module, expected: Sequence[Expected | None], inputs: Sequence[Tensor] | None = None
) -> Proof:
    """Run both and judge the difference, as :func:`repvgg.verify.verify` does.

    Args:
        old: the module as it was; it is left as it is.
        new: what is to take its place; likewise.
        expected: channels and layout of its inputs, in order; None where the forward does not tell. Inputs are made up.
        inputs: what to run both on, in the place of these.
    """
    like = first_float(old)
    dtype = torch.float32 if like is None else like.dtype
    if inputs is not None:
        return _run(old, new, _Given(inputs), [torch.ones(1, 1, dtype=dtype)])
    known = [one for one in expected if one is not None and one[1].rank is not None]
    if not known or len(known) < len(expected):
        return Proof(None, f"{NOT_RUN}: the forward does not tell what its inputs are", ran=False)
    split = _Split(known)
    first: Proof | None = None
    for height, width in _SIZES:
        proof = _run(old, new, split, border_inputs((2, split.channels, height, width), batches=1, dtype=dtype))
        if proof.ran:
            return proof
        first = first or proof
    return first or Proof(None, NOT_RUN, ran=False)


def _run(old: nn.Module, new: nn.Module, arguments: Callable[[Tensor], Sequence[Tensor]], x: list[Tensor]) -> Proof:
    like = first_float(old)
    device = torch.device("cpu") if like is None else like.device
    reference = _OneToOne(_without_hooks(old), arguments, device)
    candidate = _OneToOne(_without_hooks(new), arguments, device)
    with judging(candidate), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evidence = verify(reference, lambda x: candidate(x.to(device)), x)
            return _verdict(evidence) if evidence.passed else _weighed(evidence, reference, x)
        except Exception as error:  # a stranger's code, on images of a size that it may not be made for
            if _beside_itself(reference, x) is not None:
                return Proof(f"the new one does not run ({typed_line(error)})", "")
            return Proof(None, f"{NOT_RUN} ({typed_line(error)})", ran=False)


def _weighed(evidence: Evidence, reference: _OneToOne, x: list[Tensor]) -> Proof:
    """The verdict on two that differ: how much does the module itself, and how much where its input moves a little?"""
    own = _beside_itself(reference, x)
    if own is None or not own.passed:
        return Proof(None, f"{NOT_RUN}: its outputs are not the same twice, or not finite", ran=False)
    moved = _beside_itself(reference, x, 1 + 2 * UNIT_ROUNDOFF[x[0].dtype])
    allowed = 0.0 if moved is None else _SENSITIVE * moved.relative
    if allowed > _CHAOTIC:
        return Proof(
            None, f"{NOT_RUN}: rounding its input moves its output by {moved and moved.relative:.1e}", ran=False
        )
    if evidence.relative <= allowed and not evidence.problems:
        more = "no more than it moves where its input moves by a rounding or two"
        return Proof(None, f"{_verdict(evidence).text}: {more}")
    return _verdict(evidence)


def _beside_itself(reference: _OneToOne, x: list[Tensor], factor: float = 1.0) -> Evidence | None:
    """The evidence on a module and a copy of it, whose input is multiplied by ``factor``; None if it does not run."""
    try:
        own = copy.deepcopy(reference)
        return verify(reference, lambda x: own(x * factor if x.is_floating_point() else x), x)
    except Exception:
        return None


def _verdict(evidence: Evidence) -> Proof:
    text = f"relative error {evidence.relative:.1e} in {evidence.dtype}, on images made to show the border"
    return Proof(None if evidence.passed else "; ".join(evidence.reasons), text)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Without hooks: what those of the user collect is not for us to add to."""
    if not has_hooks(module):
        return module
    module = copy.deepcopy(module)
    for hooks in hooks_of(module):
        hooks.clear()
    return module


class _Split:
    """The inputs of a module as parts of one batch of images."""

    def __init__(self, expected: Sequence[Expected]) -> None:
        self.expected = [(count, layout, count * _DEPTH if layout.rank == 5 else count) for count, layout in expected]
        self.channels = sum(taken for _, _, taken in self.expected)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        parts = torch.split(x, [taken for _, _, taken in self.expected], 1)
        return [_as(part, layout) for part, (_, layout, _) in zip(parts, self.expected, strict=True)]


def _as(x_NCHW: Tensor, layout: Layout) -> Tensor:
    """Images as tensors of another layout."""
    if layout.rank == 5 and not layout.rows:
        return x_NCHW.reshape(len(x_NCHW), -1, _DEPTH, *x_NCHW.shape[2:])
    if layout.rank == 2:
        return x_NCHW[:, :, 0, 0]
    x = x_NCHW.flatten(2) if layout.rank == 3 else x_NCHW
    return x.movedim(1, -1) if layout.rows else x


class _Given:
    """Inputs that do not depend on the tensor of ones that a judge passes, but for its dtype and for a factor."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = list(inputs)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return [value.to(x.device, x.dtype) * x[0, 0] if value.is_floating_point() else value for value in self.inputs]


class _OneToOne(nn.Module):
    """A module as a function of one tensor that returns one: outputs are strung together."""

    def __init__(
        self, module: nn.Module, arguments: Callable[[Tensor], Sequence[Tensor]], device: torch.device
    ) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments
        self.device = device
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        """Return all numbers that the module returns."""
        leaves = list(_numbers(self.module(*self.arguments(x.to(self.device)))))
        if not leaves:
            raise UsageError("it returns no floating-point tensor")
        return torch.cat(leaves)


def _numbers(outcome: Any) -> Iterator[Tensor]:
    return (leaf.flatten() for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def depends_on_its_parts(model: nn.Module, plain: nn.Module, plan: Plan, kept: dict[int, str]) -> dict[int, str]:
    """Modules that have to stay, because a forward around them looks at what they are, and not only calls them.

    Such a forward asks for a class or an attribute of a part, and would take another way over the convolution in its
    place. Its graph over the new parts then is another one, or there is none.

    Args:
        model: the original.
        plain: what was made of it.
        plan: what was replaced.
        kept: modules that stay already.
    """
    found: dict[int, str] = {}
    replaced = [whole.path for whole in plan.wholes] + plan.dropped
    replaced += [path for unit in plan.units for path in unit.changed()]
    for path, captured in plan.captured.items():
        old, new = model.get_submodule(path), part_at(plain, path)
        if new is None or type(new) is not type(old) or not any(_inside(inner, path) for inner in replaced):
            continue
        if not is_plain_sequence(new) and not only_calls(new) and not _same(captured, new):
            reason = f"the forward of {path or 'the model'} looks at what it is"
            found |= {id(part): reason for part in old.modules() if part is not old and id(part) not in kept}
    return found


def part_at(plain: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, or None where there is none any more."""
    try:
        return plain.get_submodule(path)
    except AttributeError:  # it is part of what was replaced
        return None


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def _same(captured: Capture, new: nn.Module) -> bool:
    try:
        again = capture(new)
    except Exception:  # the code does not find what it looks for
        return False
    before = [captured.graph, *(variant.graph for variant in captured.variants)]
    after = [again.graph, *(variant.graph for variant in again.variants)]
    return list(map(str, before)) == list(map(str, after)) and _same_constants(captured, again)


def _same_constants(before: Capture, after: Capture) -> bool:
    names = [str(n.target) for n in before.graph.nodes if n.op == "get_attr" and str(n.target).startswith("_tensor")]
    pairs = [(getattr(before.root, name), getattr(after.root, name)) for name in names]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
