"""The page of a segmentation: of a training run, and of an evaluation. Both show how each class does, and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from repvgg._files import write_text
from repvgg.measure import environment
from repvgg.studies.report.page_charts import IouBar, iou_chart
from repvgg.studies.report.pictures import pictures_of
from repvgg.studies.report.render import as_markup, render_page, training_charts
from repvgg.studies.report.schema import Epoch, File
from repvgg.training.samples import Sample

_MOST_CLASSES = 40  # columns of a confusion matrix that fit on a page


class _ClassRow(NamedTuple):
    name: str
    colour: str  # CSS
    iou: float | None  # None: in neither truth nor prediction
    accuracy: float | None  # None: not in the truth
    share: float  # of the pixels
    confused: str  # the class that it is most often taken for; empty if all pixels are right
    confused_share: float  # of its pixels


@dataclass(frozen=True)
class SegmentationPage:
    """What a page shows.

    Attributes:
        name: of the model.
        headline: what was done, in a sentence.
        created: date and time in ISO 8601.
        command: that repeats it.
        classes: names.
        palette: a colour per class.
        forms: ``SegmentationEvaluation.to_dict()`` of each form of the model; the last one is shown by class.
        ignore_index: label of the pixels that were not counted.
        inference: how the network was applied, in words.
        agreement: pixels in which both forms predict the same class, and all pixels; None for a single form.
        evidence: of the equality of both forms; None if it was not verified.
        samples: a few images with masks.
        history: learning curves, with mIoU as accuracy; empty for an evaluation.
        seconds: time of the training.
        skipped: images that could not be read.
        files: in the folder of the page.
        facts: settings.
    """

    name: str
    headline: str
    created: str
    command: str
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    forms: Mapping[str, Mapping[str, Any]]
    ignore_index: int = 255
    inference: str = "whole images"
    agreement: tuple[int, int] | None = None
    evidence: Mapping[str, Any] | None = None
    samples: Sequence[Sample] = ()
    history: tuple[Epoch, ...] = ()
    seconds: float | None = None
    skipped: int = 0
    files: Sequence[File] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def render(self) -> str:
        """Return the page as HTML.

        Raises:
            MissingDependencyError: Jinja2, Matplotlib or Pillow is not installed.
        """
        result = list(self.forms.values())[-1]
        rows = _class_rows(self.classes, self.palette, result)
        order = sorted(rows, key=lambda row: -1.0 if row.iou is None else row.iou, reverse=True)
        charts: dict[str, Any] = training_charts(self.history, "Validation mIoU") if self.history else {}
        bars = [IouBar(row.name, row.iou) for row in order]
        pictures = [pictures_of(sample, self.palette, self.ignore_index) for sample in self.samples]
        return render_page(
            "segmentation.html.j2",
            created=self.created,
            machine=environment(),
            page=self,
            result=result,
            class_rows=order,
            charts={**charts, "iou": as_markup(iou_chart(bars))},
            pictures=pictures,
            legend_rows=_in_pictures(rows, self.samples),
            matrix=_matrix(rows, result["confusion"]),
            most_classes=_MOST_CLASSES,
        )

    def write(self, path: Path, *, overwrite: bool = True) -> Path:
        """Write the page.

        Raises:
            OutputExistsError: ``path`` exists and ``overwrite`` is not set.
            OutputError: it cannot be written.
            MissingDependencyError: see :meth:`render`.
        """
        return write_text(path, self.render(), overwrite=overwrite)


def _class_rows(names: Sequence[str], palette: Sequence[Sequence[int]], result: Mapping[str, Any]) -> list[_ClassRow]:
    confusion, total = result["confusion"], max(1, result["pixels"])
    rows = []
    for index, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        others = [(count, other) for other, count in enumerate(counts) if other != index and count]
        times, other = max(others, key=lambda pair: pair[0], default=(0, 0))
        pixels = sum(counts)
        red, green, blue = palette[index]
        rows.append(
            _ClassRow(
                name,
                f"rgb({int(red)} {int(green)} {int(blue)})",
                result["iou"][index],
                result["accuracy"][index],
                pixels / total,
                names[other] if times else "",
                times / max(1, pixels),
            )
        )
    return rows


def _in_pictures(rows: Sequence[_ClassRow], samples: Sequence[Sample]) -> list[_ClassRow]:
    """Return the rows of the classes that the masks of the samples have."""
    seen: set[int] = set()
    for sample in samples:
        seen |= set(map(int, set(sample.truth.reshape(-1).tolist()) | set(sample.prediction.reshape(-1).tolist())))
    return [row for index, row in enumerate(rows) if index in seen]


def _matrix(rows: Sequence[_ClassRow], confusion: Sequence[Sequence[int]]) -> list[tuple[_ClassRow, list[float]]]:
    """Return each class with the shares of its pixels that are predicted as each class; none if there are too many."""
    if len(rows) > _MOST_CLASSES:
        return []
    return [
        (row, [count / max(1, sum(counts)) for count in counts]) for row, counts in zip(rows, confusion, strict=True)
    ]


def epochs_of(history: Sequence[Mapping[str, Any]]) -> tuple[Epoch, ...]:
    """Return the learning curves of a report: mIoU in place of accuracy; 0 where it is undefined."""
    return tuple(
        Epoch(row["epoch"], float(row["loss"]), _finite(row["held_out_miou"]) or 0.0, _finite(row.get("held_out_loss")))
        for row in history
    )


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
