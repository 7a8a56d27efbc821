"""What a collapse did, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

NOT_RUN = "not run on its own"


@dataclass(frozen=True)
class Part:
    """Something that was folded: a submodule or an operation, and what it is made of."""

    name: str
    description: str


@dataclass(frozen=True)
class Folded:
    """A linear region that became one convolution.

    Attributes:
        name: path of the convolution in the plain model.
        parts: what was folded into it, in the order of execution.
        convolution: the outcome, in words.
        parameters_before: number of parameters of all parts.
        parameters_after: number of parameters of the convolution.
        multiply_adds_before: per pixel of the region's input; borders aside, where its size is not known.
        multiply_adds_after: the same for the convolution.
        proof: how equal the convolution is to what it replaced; empty if nobody asked.
        pixels: of the region's input, one image of the inputs that were given; None without inputs.
    """

    name: str
    parts: tuple[Part, ...]
    convolution: str
    parameters_before: int
    parameters_after: int
    multiply_adds_before: float
    multiply_adds_after: float
    proof: str = ""
    pixels: int | None = None

    @property
    def macs(self) -> tuple[int, int]:
        """Multiply-adds before and after: for one image if its size is known, else for one pixel of the input."""
        pixels = self.pixels or 1
        return round(self.multiply_adds_before * pixels), round(self.multiply_adds_after * pixels)


@dataclass(frozen=True)
class LeftAlone:
    """Something that stays as it was, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """All that a collapse folded, left alone and dropped.

    Attributes:
        folded: the regions that became convolutions.
        left: what might have been expected to fold, and did not.
        dropped: submodules that run in training mode only; the plain model does without them.
        proof: how equal the plain model is to the model as a whole, or why that could not be found out; empty if nobody
            asked.
        in_pieces: modules whose forward cannot be traced: what is in them was looked at piece by piece.
    """

    folded: tuple[Folded, ...]
    left: tuple[LeftAlone, ...]
    dropped: tuple[LeftAlone, ...]
    proof: str = ""
    in_pieces: tuple[LeftAlone, ...] = ()

    @property
    def parameters_saved(self) -> int:
        """How many parameters fewer the folded regions have."""
        return sum(region.parameters_before - region.parameters_after for region in self.folded)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{len(self.folded)} regions folded, {self.parameters_saved:,} parameters saved"
        for region in self.folded:
            parts = " + ".join(_named(part) for part in region.parts)
            yield f"  {region.name or '(root)'}: {parts} → {region.convolution}"
            macs = " → ".join(f"{count:,}" for count in region.macs)
            per = "" if region.pixels else " a pixel"
            numbers = f"{region.parameters_before:,} → {region.parameters_after:,} parameters"
            yield f"    {numbers}, {macs} multiply-adds{per}{'; ' if region.proof else ''}{region.proof}"
        groups = {"left alone": self.left, "dropped": self.dropped, "looked at in pieces": self.in_pieces}
        for title, rows in groups.items():
            if rows:
                yield f"{len(rows)} {title}"
            for row in rows:
                yield f"  {row.name or '(root)'}: {row.reason}"
        if self.proof:
            yield f"the whole model: {self.proof}"


def _named(part: Part) -> str:
    return f"{part.name} ({part.description})" if part.name else part.description
