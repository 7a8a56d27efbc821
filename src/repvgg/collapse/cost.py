"""What a linear region costs before and after merging, and which merges pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from repvgg.algebra import ConvMap, with_symmetric_padding
from repvgg.errors import UsageError
from repvgg.symbolic import Source, SymbolicTensor

# The two sides of the comparison add the same terms in different orders; equal costs must compare as equal.
_RELATIVE_SLACK = 1e-9


def emitted_map(conv: ConvMap) -> ConvMap:
    """Return ``conv`` with a padding that ``nn.Conv2d`` can express: ``"same"``, else made symmetric.

    Symmetric padding may need a larger kernel, so this is also the map whose cost counts.
    """
    # torch pads an odd total with the larger half after the image.
    halves = [(axis.reach // 2, axis.reach - axis.reach // 2) for axis in conv.axes]
    is_same = max(conv.stride, default=1) == 1 and halves == [(axis.before, axis.after) for axis in conv.axes]
    return conv if is_same else with_symmetric_padding(conv)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per pixel of a region's source, and number of kernel weights.

    Multiply-adds are exact for a source of known size; otherwise borders are ignored. Average pools count as the
    depthwise convolutions that they are; batch norms, sums and identities count as zero.
    """

    multiply_adds: float = 0.0
    weights: int = 0  # biases do not count: every merged convolution has one

    @classmethod
    def of_ledger(cls, source: Source) -> Cost:
        """Return what was recorded on ``source`` so far."""
        return cls(source.multiply_adds, source.weights)

    @classmethod
    def of_map(cls, conv: ConvMap, sizes: tuple[int, ...] | None = None) -> Cost:
        """Return the cost of the module that computes ``conv``, for a source of spatial ``sizes`` if known."""
        weights = emitted_map(conv).kernel.numel()
        return cls(weights * conv.outputs_per_input(sizes), weights)

    @classmethod
    def of_symbol(cls, symbol: SymbolicTensor, averaged: bool = False) -> Cost:
        """Return the cost of the module that computes ``symbol``, from its source or (``averaged``) from its mean."""
        cost = cls.of_map(symbol.map, symbol.source.sizes)
        return cls(cost.weights * symbol.source.outputs_per_input(symbol.map, True), cost.weights) if averaged else cost

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds + other.multiply_adds, self.weights + other.weights)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds - other.multiply_adds, self.weights - other.weights)


Policy: TypeAlias = Callable[[Cost, Cost], bool]  # whether a merge pays, by the costs before and after


def cheaper(before: Cost, after: Cost) -> bool:
    """Whether a merge increases neither multiply-adds nor weights: the default policy."""
    return after.multiply_adds <= before.multiply_adds * (1 + _RELATIVE_SLACK) and after.weights <= before.weights


def policy_of(policy: str | Policy) -> Policy:
    """Return the policy for a name ("cheaper", "always"), or a function of two costs itself; else raise UsageError."""
    if callable(policy):
        return policy
    if policy not in ("cheaper", "always"):
        raise UsageError(f"policy must be 'cheaper', 'always' or a function of two costs, got {policy!r}.")
    return cheaper if policy == "cheaper" else lambda before, after: True
