"""The cells of an ablation, read: accuracies over seeds, differences to the full block, and speeds of steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from repvgg.studies.store import Cell
from repvgg.studies.timing import Speeds
from repvgg.studies.variants import FULL, MEMORY, Variant


@dataclass(frozen=True)
class Spread:
    """One quantity over seeds."""

    values: Mapping[int, float]  # by seed

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def minus(self, other: Spread) -> Spread:
        """Return the differences seed by seed, for the seeds of both."""
        return Spread({seed: self.values[seed] - other.values[seed] for seed in self.values if seed in other.values})

    def __str__(self) -> str:
        if self.mean is None:
            return "nothing"
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{spread}".replace("-", "−")  # a typographic minus, as in the printed deltas


@dataclass(frozen=True, eq=False)
class Results:
    """All cells of an ablation, complete or not."""

    variants: tuple[Variant, ...]  # rows of the table
    values: Mapping[str, Cell]  # the cells by their keys
    batch: int  # images in a training step

    def trained(self, name: str) -> list[Cell]:
        """Return the cells of a variant whose training finished, by seed."""
        return sorted((cell for cell in self._cells(name) if "failed" not in cell), key=lambda cell: int(cell["seed"]))

    def failed(self, name: str) -> list[Cell]:
        """Return the cells of a variant whose loss diverged."""
        return [cell for cell in self._cells(name) if "failed" in cell]

    def _cells(self, name: str) -> list[Cell]:
        # With the "-seed": "repvgg" must not match "repvgg_no_identity-seed0".
        return [value for key, value in self.values.items() if key.startswith(f"{name}-seed")]

    def accuracy(self, name: str, form: str = "trained") -> Spread:
        """Return the top-1 accuracy in percent, as trained or as deployed."""
        return Spread({int(cell["seed"]): float(cell[form]["top1_percent"]) for cell in self.trained(name)})

    def delta_to_full(self, name: str) -> Spread:
        """Return the accuracy minus that of the full block, in points, seed by seed."""
        # Seed by seed: variants with the same seed see the same images in the same order, so noise partly cancels.
        return self.accuracy(name).minus(self.accuracy(FULL))

    def paper_delta_to_full(self, variant: Variant) -> float | None:
        """Return the paper's accuracy minus that of its full block, in points; None if it does not print both."""
        full = next((other.top1_percent for other in self.variants if other.name == FULL), None)
        return None if full is None or variant.top1_percent is None else variant.top1_percent - full

    @cached_property
    def speeds(self) -> Speeds:
        """Speeds of training steps."""
        return Speeds.from_cells(self.values, self.batch)

    def step_megabytes(self, name: str) -> float | None:
        """Return the peak memory of a training step, in MB."""
        found = self.values.get(MEMORY, {}).get(name)
        return None if found is None else found / 1e6
