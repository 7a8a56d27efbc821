"""What a linear region costs before and after merging, and which merges pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from repvgg.algebra import ConvMap, with_symmetric_padding
from repvgg.errors import UsageError
from repvgg.symbolic import Source, SymbolicTensor

# The two sides of the comparison add the same terms in different orders; equal costs must compare as equal.
_RELATIVE_SLACK = 1e-9


def emitted_map(conv: ConvMap) -> ConvMap:
    """Return ``conv`` with a padding that ``nn.Conv2d`` can express: ``"same"`` as it is, else made symmetric.

    Symmetric padding may need a larger kernel, so this is also the map whose cost counts.
    """
    return conv if _is_same_padding(conv) else with_symmetric_padding(conv)


def _is_same_padding(conv: ConvMap) -> bool:
    # torch pads an odd total with the larger half after the image.
    return max(conv.stride, default=1) == 1 and all(
        (axis.before, axis.after) == (axis.reach // 2, axis.reach - axis.reach // 2) for axis in conv.axes
    )


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
    def of_symbol(cls, symbol: SymbolicTensor) -> Cost:
        """Return the cost of the module that computes ``symbol`` from its source."""
        return cls.of_map(symbol.map, symbol.source.sizes)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds + other.multiply_adds, self.weights + other.weights)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds - other.multiply_adds, self.weights - other.weights)

    def pays_for(self, before: Cost) -> bool:
        """Whether this needs no more multiply-adds and no more weights than ``before``."""
        return self.multiply_adds <= before.multiply_adds * (1 + _RELATIVE_SLACK) and self.weights <= before.weights


@dataclass(frozen=True)
class Policy:
    """Decide which merged convolutions pay: ``policy(before, after)``.

    Attributes:
        decide: a function of the two costs; None accepts merges that increase neither multiply-adds nor weights.
    """

    decide: Callable[[Cost, Cost], bool] | None = None

    @classmethod
    def of(cls, policy: str | Callable[[Cost, Cost], bool]) -> Policy:
        """Return the policy for a name ("cheaper", "always") or a function of two costs.

        Raises:
            UsageError: there is no policy of that name.
        """
        if callable(policy):
            return cls(policy)
        if policy not in ("cheaper", "always"):
            raise UsageError(f"policy must be 'cheaper', 'always' or a function of two costs, got {policy!r}.")
        return cls(None if policy == "cheaper" else lambda before, after: True)

    @property
    def is_cheaper(self) -> bool:
        """Whether this is the default policy, which depends on the costs alone."""
        return self.decide is None

    def __call__(self, before: Cost, after: Cost) -> bool:
        """Whether to merge."""
        return after.pays_for(before) if self.decide is None else bool(self.decide(before, after))


CHEAPER = Policy()
