"""What an expansion did, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Expanded:
    """A convolution that became a module with more parameters.

    Attributes:
        name: path of the convolution, and now of the module that replaced it.
        also: further paths of the same module, if it is shared.
        convolution: a description of the convolution.
        parameters_before: number of parameters of the convolution.
        parameters_after: number of parameters of its replacement.
        error: largest difference in kernel or bias from the convolution, as stored in its dtype, relative to the
            largest number in them. It was at most 1e-12 in float64; the rest is rounding. None if the block starts with
            new values.
        fresh: why the block starts with new values, and computes another function; empty if it does not.
    """

    name: str
    also: tuple[str, ...]
    convolution: str
    parameters_before: int
    parameters_after: int
    error: float | None
    fresh: str = ""


@dataclass(frozen=True)
class Skipped:
    """A convolution that stays as it was, with the reason."""

    name: str
    reason: str


Kept = Skipped  # the former name, kept for code that imports it


@dataclass(frozen=True)
class ExpandReport:
    """All convolutions of a model: those that were expanded and those that were not.

    Attributes:
        expanded: the convolutions that were replaced, in the order of the model.
        left: all others.
    """

    expanded: tuple[Expanded, ...]
    left: tuple[Skipped, ...]

    @property
    def parameters_added(self) -> int:
        """The number of additional parameters."""
        return sum(entry.parameters_after - entry.parameters_before for entry in self.expanded)

    @property
    def is_exact(self) -> bool:
        """Whether each block starts out equal to the convolution that it replaces."""
        return not any(entry.fresh for entry in self.expanded)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{len(self.expanded)} convolutions expanded, {self.parameters_added:,} parameters added"
        for entry in self.expanded:
            also = f" (also {', '.join(entry.also)})" if entry.also else ""
            how = f"begins afresh: {entry.fresh}" if entry.error is None else f"error {entry.error:.1e}"
            yield f"  {entry.name or '(root)'}{also}: {entry.convolution}, {how}"
        if self.left:
            yield f"{len(self.left)} left alone"
        for skipped in self.left:
            yield f"  {skipped.name or '(root)'}: {skipped.reason}"
