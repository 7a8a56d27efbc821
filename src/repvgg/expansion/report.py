"""What an expansion did, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Expanded:
    """A convolution that became a module with more to train.

    Attributes:
        name: path of the convolution, and of what stands there now.
        also: further paths of the same module, where it is shared.
        convolution: what it was, in words.
        parameters_before: number of parameters of the convolution.
        parameters_after: number of parameters of what stands there now.
        error: largest difference in kernel or bias from the convolution, as stored in its dtype, relative to the
            largest number in them. In float64 it was at most 1e-12; the rest is rounding. None where the block begins
            afresh.
        fresh: why the block keeps its fresh values, and computes another function; empty where it does not.
    """

    name: str
    also: tuple[str, ...]
    convolution: str
    parameters_before: int
    parameters_after: int
    error: float | None
    fresh: str = ""


@dataclass(frozen=True)
class Kept:
    """A convolution that stays as it was, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class ExpandReport:
    """All convolutions of a model: those that were expanded and those that were not.

    Attributes:
        expanded: the convolutions that were replaced, in the order of the model.
        left: all others.
    """

    expanded: tuple[Expanded, ...]
    left: tuple[Kept, ...]

    @property
    def parameters_added(self) -> int:
        """How many parameters more there are to train."""
        return sum(row.parameters_after - row.parameters_before for row in self.expanded)

    @property
    def is_exact(self) -> bool:
        """Whether each block begins as the convolution in whose place it stands."""
        return not any(row.fresh for row in self.expanded)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{len(self.expanded)} convolutions expanded, {self.parameters_added:,} parameters added"
        for row in self.expanded:
            also = f" (also {', '.join(row.also)})" if row.also else ""
            how = f"begins afresh: {row.fresh}" if row.error is None else f"error {row.error:.1e}"
            yield f"  {row.name or '(root)'}{also}: {row.convolution}, {how}"
        if self.left:
            yield f"{len(self.left)} left alone"
        for kept in self.left:
            yield f"  {kept.name or '(root)'}: {kept.reason}"
