"""Where the merged convolution of a region is called, and which forwards change for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from repvgg.collapse.capture import Capture
from repvgg.collapse.symbolic_eval import Region

WhyFrozen: TypeAlias = Callable[[str], str | None]  # why the forward of the module at a path must stay, or None


@dataclass(frozen=True)
class InsertionPoint:
    """Where the merged convolution of a region is called, and which forwards change for it.

    Attributes:
        in_place: True to put the convolution where the first one of a chain is, and identities where the others are,
            each in its own module; False to replace the region by one call in one forward.
        host: path of the module whose forward calls the convolution.
        rewritten: paths of the modules that get a new forward, or are inlined into that of their caller.
        inlined: the subset of them that is inlined.
    """

    in_place: bool
    host: str
    rewritten: frozenset[str]
    inlined: frozenset[str]


@dataclass(frozen=True, eq=False, repr=False)
class Replacement:
    """A region and the insertion point of its merged convolution."""

    region: Region
    insertion: InsertionPoint


def find_insertion_point(region: Region, why_frozen: WhyFrozen) -> InsertionPoint | str:
    """Return how to replace ``region``, or the reason why the code around it does not allow that."""
    if region.layout_in_place is not None:
        point = _insert_along_chain(region)
    elif region.value.symbol.is_convolution:
        point = _insert_as_one_call(region)
    else:
        return "its axes are permuted, reshaped or averaged where its branches meet"
    # Sorted, so that the reason that a report gives does not depend on hashes.
    reasons = (why_frozen(path) for path in sorted(point.rewritten))
    return next((reason for reason in reasons if reason), None) or _conflicting_variant(region, point) or point


def _insert_along_chain(region: Region) -> InsertionPoint:
    # Replacing a called module does not change its caller's code. Only a folded function call needs a new forward.
    owner = region.inlined.owner
    functions = (step.node for step in region.steps if step.node.op != "call_module" and step.computes)
    host = owner(region.first_convolution)
    return InsertionPoint(True, host, frozenset(map(owner, functions)), frozenset())


def _insert_as_one_call(region: Region) -> InsertionPoint:
    # The call goes into the innermost forward around all of the region; forwards below it are inlined there.
    stacks = [region.inlined.call_stack(region.inlined.owner(step.node)) for step in region.steps]
    host = next(path for path in stacks[0] if all(path in stack for stack in stacks))
    rewritten = frozenset(path for stack in stacks for path in stack[: stack.index(host) + 1])
    return InsertionPoint(False, host, rewritten, rewritten - {host})


def _conflicting_variant(region: Region, point: InsertionPoint) -> str | None:
    """Why an in-place replacement would change what a forward computes for other values of its optional arguments."""
    owners = {region.inlined.owner(step.node) for step in region.steps}
    stacks = [region.inlined.call_stack(path) for path in owners]
    shared = set(stacks[0]).intersection(*stacks)
    # The forwards between the region and the innermost one around all of it, that one included.
    touched = {path for stack in stacks for path in stack if path not in shared} | owners
    touched.add(next(path for path in stacks[0] if path in shared))
    for path in sorted(touched):
        captured = region.inlined.captures[path]
        if captured.variants and not (owners == {path} and _is_same_chain_in_variants(region, captured)):
            return f"the forward around it {captured.caveat or 'takes optional arguments'}"
    return None


def _is_same_chain_in_variants(region: Region, captured: Capture) -> bool:
    """Whether a region of module calls is the same chain, or absent, for other values of optional arguments."""
    targets = [region.inlined.origin[step.node][1].target for step in region.steps]
    if any(step.node.op != "call_module" for step in region.steps):
        return False
    for variant in captured.variants:
        nodes = [node for node in variant.graph.nodes if node.op == "call_module" and node.target in targets]
        # Modules that the variant calls elsewhere, or in another order, would see the merged convolution.
        linked = all(b.args == (a,) and not b.kwargs and len(a.users) == 1 for a, b in pairwise(nodes))
        if nodes and not (linked and [node.target for node in nodes] == targets):
            return False
    return True
