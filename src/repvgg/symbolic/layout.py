"""Which shape of tensor a symbol stands for: how many axes it has, and which of them are the channels.

Letters: N images, C channels, L length, D, H and W depth, height and width; ``...`` any number of axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from repvgg.errors import UsageError

_SHAPES = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}


@dataclass(frozen=True)
class Layout:
    """The shape (N, C, *X) with the channels at axis 1, or (..., C), rows, with the channels last.

    (N, C) is both at once: ``Layout(2) == Layout(2, rows=True)``.

    Attributes:
        rank: the number of axes; None where it is not known, which only rows allow.
        rows: whether the channels are the last axis.

    Raises:
        UsageError: there is no such shape.
    """

    rank: int | None
    rows: bool = False

    def __post_init__(self) -> None:
        if self.rank == 2:
            object.__setattr__(self, "rows", True)
        if (self.rank is None or not 3 <= self.rank <= 5) and not self.rows:
            raise UsageError(f"A tensor with channels at axis 1 has 2 to 5 axes, not {self.rank}.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"Rows have at least 1 axis, not {self.rank}.")

    @property
    def spatial(self) -> int:
        """How many axes a convolution of such a tensor reaches along; 0 for rows."""
        return 0 if self.rows or self.rank is None else self.rank - 2

    @property
    def axis(self) -> int:
        """The axis of the channels, counted from the end."""
        return -1 - self.spatial

    def is_channel_axis(self, dim: int) -> bool:
        """Whether ``dim``, from the front or from the end, is the axis of the channels."""
        return dim == self.axis or (self.rank is not None and dim == self.axis + self.rank)

    def __str__(self) -> str:
        """Such as (N, C, H, W)."""
        if self.rows and self.rank not in (None, 2):
            return f"({'·, ' * ((self.rank or 1) - 1)}C)"
        return "(..., C)" if self.rank is None else _SHAPES[self.rank]


IMAGES = Layout(4)
SEQUENCES = Layout(3)
VOLUMES = Layout(5)
VECTORS = Layout(2)
ROWS = Layout(None, rows=True)
