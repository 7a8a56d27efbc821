"""Sums of more than two addends, of which some are functions of one tensor: ``a + b + c`` is ``(a + c) + b``.

The graph adds two tensors at a time, and the search merges the operands of one addition only. Here all addends of a
chain of additions are compared with each other, whatever their order, and those are merged of which one convolution is
cheaper. Only rounding differs from the order of the model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx

from repvgg.collapse.cost import Cost, Policy
from repvgg.collapse.region import Addition, Region, Step, Value
from repvgg.collapse.symbolic_eval import SymbolicValues
from repvgg.errors import ReparamError

_IN_PLACE: set[Any] = {operator.iadd, Tensor.add_, "add_"}
_ADDITIONS: set[Any] = {operator.add, torch.add, Tensor.add, "add"} | _IN_PLACE


@dataclass(frozen=True, eq=False)
class _Addend:
    """An operand of an addition: ``value`` is the function of its source, and ``cost`` what that costs by itself."""

    node: fx.Node
    addition: fx.Node
    value: Value
    cost: Cost


@dataclass(frozen=True, eq=False)
class _Group:
    """Addends of one sum that become one convolution, with their sum."""

    addends: tuple[_Addend, ...]
    value: Value
    cost: Cost

    def merged_with(self, other: _Group, policy: Policy) -> tuple[float, _Group] | None:
        """Return the union of two groups and the multiply-adds that it saves; None if it does not exist or pay."""
        addends = self.addends + other.addends
        # Operands of one addition were compared by the search.
        if len({addend.addition for addend in addends}) < len(addends):
            return None
        # Of other sources, or with other sizes.
        if self.value.symbol.source is not other.value.symbol.source:
            return None
        try:
            symbol = operator.add(self.value.symbol.copy(), other.value.symbol.copy())
        except ReparamError:
            return None
        apart, together = self.cost + other.cost, Cost.of_symbol(symbol)
        value = Value(self.value.source, symbol, start=self.value.start)
        saved = apart.multiply_adds - together.multiply_adds
        return (saved, _Group(addends, value, together)) if policy(apart, together) else None


def parts_of_sums(
    values: SymbolicValues, fixed: Collection[fx.Node], policy: Policy, is_candidate: Callable[[Value], bool]
) -> Iterator[Region]:
    """Yield the parts of sums that are worth replacing by one convolution, once the search has found all else.

    Args:
        values: those at the end of the search.
        fixed: nodes whose tensors must stay as they are.
        policy: whether a merge pays.
        is_candidate: whether a value will be replaced by one convolution.
    """
    for additions in _chains(values, fixed):
        groups = [_Group((a,), a.value, a.cost) for a in _addends(values, fixed, additions, is_candidate)]
        while True:
            merged = [(found, a, b) for a, b in combinations(groups, 2) if (found := a.merged_with(b, policy))]
            if not merged:
                break
            (_, union), first, second = max(merged, key=lambda found: found[0][0])
            groups = [group for group in groups if group not in (first, second)] + [union]
        gone: set[fx.Node] = set()
        regions = [_region(values, group, additions, gone) for group in groups if len(group.addends) > 1]
        # In this order, an addition that goes is replaced by one that stays, or that went before.
        for region in sorted(filter(None, regions), key=lambda region: values.order[region.exit]):
            if region.value.is_worthwhile and not _writes_to_addend(region):
                yield region


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the operands of an addition of two tensors, or None for other nodes."""
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def _chains(values: SymbolicValues, fixed: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Return the chains of additions that are not merged, each in execution order, the whole sum last."""
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node in values.order:
        if node in values.by_node or node in values.fixed or (both := operands_of(node)) is None:
            continue
        # A partial sum that something else reads must keep its value.
        inner = [n for n in both if n in chains and list(n.users) == [node] and n not in fixed]
        chains[node] = [addition for n in dict.fromkeys(inner) for addition in chains.pop(n)] + [node]
    order = values.order.__getitem__
    long = [sorted(additions, key=order) for additions in chains.values() if len(additions) > 1]
    return [chain for chain in long if not any(n in values.constants for node in chain for n in node.all_input_nodes)]


def _addends(
    values: SymbolicValues,
    fixed: Collection[fx.Node],
    additions: list[fx.Node],
    is_candidate: Callable[[Value], bool],
) -> list[_Addend]:
    """Return the addends of a sum that may become part of a convolution."""
    operands = [(n, node) for node in additions for n in operands_of(node) or () if n not in additions]
    found: list[_Addend] = []
    for n, addition in operands:
        value = values.by_node.get(n)
        # It goes, so that nothing else may read it.
        if value is not None and list(n.users) == [addition] and n not in fixed and operands_of(addition) != (n, n):
            found.append(_Addend(n, addition, value, value.merged_cost if is_candidate(value) else value.cost))
    # The sources themselves, as in ``conv(x) + b + x``.
    starts = {addend.value.start: None for addend in found if addend.value.start is not None}
    for start in starts:
        found += [_Addend(n, addition, start, Cost()) for n, addition in operands if n is start.source]
    order = values.order
    return sorted(found, key=lambda addend: (order[addend.addition], order[addend.node]))


def _region(values: SymbolicValues, group: _Group, additions: list[fx.Node], gone: set[fx.Node]) -> Region | None:
    """Return the region of a group, and add the additions that go for it to ``gone``; None if one is gone already."""
    # The convolution takes the place of an addend. The source stays, because others read it.
    computed = [addend for addend in group.addends if addend.value.step is not None]
    orders = ([first, *(a for a in group.addends if a is not first)] for first in computed)
    addends = next((order for order in orders if not gone & {addend.addition for addend in order[1:]}), None)
    if addends is None:
        return None
    gone |= {addend.addition for addend in addends[1:]}
    merged = {addend.addition: addend.node for addend in addends}
    below: dict[fx.Node, set[fx.Node]] = {}
    for node in additions:  # the additions of the group that each one contains
        inner = [below[n] for n in operands_of(node) or () if n in below]
        below[node] = ({node} & merged.keys()).union(*inner)
    # The first addition that contains all of them, and those between it and them.
    exit_node = next(node for node in additions if below[node] == merged.keys())
    found: list[Addition] = []
    for node in additions:
        if below[node] and _contains(additions, exit_node, node):
            first, second = operands_of(node) or (node, node)
            step = Step(node, values.order[node], ("add",), Cost(), False)
            found.append(Addition(step, merged.get(node), second if merged.get(node) is first else first))
    value = replace(group.value, step=found[-1].step, inputs=tuple([addend.value for addend in computed]))
    return Region(values.recording, exit_node, value, tuple([addend.node for addend in addends]), tuple(found))


def _writes_to_addend(region: Region) -> bool:
    """Whether an addition in place would write to an addend that stays, because the addition before it goes."""
    additions = {add.step.node for add in region.additions}
    left_alone = any(
        add.merged not in (None, region.replaced) and add.kept not in additions for add in region.additions
    )
    return left_alone and any(node.target in _IN_PLACE for node in additions)


def _contains(additions: list[fx.Node], outer: fx.Node, inner: fx.Node) -> bool:
    """Whether the sum ``outer`` contains the partial sum ``inner``."""
    node = inner
    while node is not outer and node is not additions[-1]:
        node = next(iter(node.users))
    return node is outer
