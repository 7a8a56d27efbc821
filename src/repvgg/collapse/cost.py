"""What pays: the costs of a region before and after merging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from repvgg.algebra import ConvMap, with_symmetric_padding
from repvgg.errors import UsageError
from repvgg.symbolic import Source, SymbolicTensor

_SLACK = 1e-9


def emitted_map(conv: ConvMap) -> ConvMap:
    """The map as ``nn.Conv2d`` can hold it: with symmetric padding, unless ``padding="same"`` says it as it is."""
    return conv if _same_padding(conv) else with_symmetric_padding(conv)


def _same_padding(conv: ConvMap) -> bool:
    """Whether the padding is what ``padding="same"`` gives: the larger half of an odd total behind."""
    return max(conv.stride, default=1) == 1 and all(
        (axis.before, axis.after) == (axis.reach // 2, axis.reach - axis.reach // 2) for axis in conv.axes
    )


@dataclass(frozen=True)
class Cost:
    """Multiply-adds per pixel of a region's source, and the size of the kernels.

    Multiply-adds are those at the size of the source, where it is known, and else those far from any border.

    Average pools count as the depthwise convolutions that they are; a batch norm, a sum or an identity as nothing.
    """

    multiply_adds: float = 0.0
    weights: int = 0

    @classmethod
    def of_ledger(cls, source: Source) -> Cost:
        """What was spent on ``source`` so far."""
        return cls(source.multiply_adds, source.weights)

    @classmethod
    def of_map(cls, conv: ConvMap, sizes: tuple[int, ...] | None = None) -> Cost:
        """What the one ``nn.Conv2d`` costs that computes ``conv``, on a source of those ``sizes`` if they are known."""
        weights = emitted_map(conv).kernel.numel()
        return cls(weights * conv.outputs_per_input(sizes), weights)

    @classmethod
    def of_symbol(cls, symbol: SymbolicTensor) -> Cost:
        """The same for what a symbol stands for."""
        return cls.of_map(symbol.map, symbol.source.sizes)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds + other.multiply_adds, self.weights + other.weights)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.multiply_adds - other.multiply_adds, self.weights - other.weights)

    def pays_for(self, before: Cost) -> bool:
        """Whether this costs neither more multiply-adds nor more weights than ``before``."""
        return self.multiply_adds <= before.multiply_adds * (1 + _SLACK) and self.weights <= before.weights


@dataclass(frozen=True)
class Policy:
    """Which merged convolutions pay: ``policy(before, after)``.

    Attributes:
        decide: a function of two costs. None is for those that are not dearer, in multiply-adds and in weights.
    """

    decide: Callable[[Cost, Cost], bool] | None = None

    @classmethod
    def of(cls, policy: str | Callable[[Cost, Cost], bool]) -> Policy:
        """The policy that a user names, or gives as a function.

        Raises:
            UsageError: there is no policy of that name.
        """
        if callable(policy):
            return cls(policy)
        if policy not in ("cheaper", "always"):
            raise UsageError(f"A policy is 'cheaper', 'always' or a function of two costs, not {policy!r}.")
        return cls(None if policy == "cheaper" else lambda before, after: True)

    @property
    def is_cheaper(self) -> bool:
        """Whether it goes by the costs alone."""
        return self.decide is None

    def __call__(self, before: Cost, after: Cost) -> bool:
        """Whether merging pays."""
        return after.pays_for(before) if self.decide is None else bool(self.decide(before, after))


CHEAPER = Policy()
