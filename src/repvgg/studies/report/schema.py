"""The content of ``report.json``: frozen dataclasses that :mod:`.render` shows as ``report.html``.

Field names are the keys of the file, so they cannot change within a schema version. All numbers are in SI units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from repvgg._serde import from_plain, json_ready
from repvgg.errors import UsageError

SCHEMA_VERSION = 1

#: The form of the model that a timing belongs to: with branches, batch norms folded, plain, or in another runtime.
Role = Literal["train", "folded", "plain", "runtime"]


@dataclass(frozen=True)
class Model:
    """The network and its cost before and after the collapse; MACs are for one image of ``input_size``."""

    name: str
    num_classes: int
    in_channels: int
    input_size: int
    params_train: int
    params_plain: int
    macs_plain: int
    macs_train: int | None = None


@dataclass(frozen=True)
class Data:
    """The dataset: sizes of the training and validation splits, and the class names."""

    name: str
    train_count: int
    held_out_count: int  # of the validation split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Epoch:
    """One point of the learning curves: mean training loss, validation accuracy in [0, 1], and validation loss."""

    epoch: int
    loss: float
    accuracy: float
    val_loss: float | None = None  # None in reports that do not have it


@dataclass(frozen=True)
class Training:
    """The result of training. ``confusion[true][predicted]`` counts validation images."""

    epochs: int
    seconds: float
    history: tuple[Epoch, ...]
    accuracy: float
    confusion: tuple[tuple[int, ...], ...]

    @property
    def num_evaluated(self) -> int:
        """Number of validation images."""
        return sum(map(sum, self.confusion))

    @property
    def num_correct(self) -> int:
        """Number of validation images on the diagonal of the confusion matrix."""
        return sum(row[index] for index, row in enumerate(self.confusion))


@dataclass(frozen=True)
class Region:
    """Branches that were merged into one convolution; regions are listed in execution order."""

    name: str  # path of the region in the model, `stages.0.1.conv`
    branches: tuple[str, ...]  # one description per branch, `3x3 conv + BN`; the branches are summed
    kernel: tuple[int, ...]  # height and width of the merged convolution
    stride: tuple[int, ...]  # vertical and horizontal
    groups: int  # of the merged convolution
    in_channels: int  # of the merged convolution
    out_channels: int  # of the merged convolution
    params_before: int  # parameters of all branches
    params_after: int  # parameters of the merged convolution
    # Relative error of this convolution alone, given the reference's input; None if not measured.
    error_made: float | None = None
    # Relative error of its output when the whole plain network runs; None if not measured.
    error_arriving: float | None = None
    then: str = "ReLU"  # the layer after the sum, which is the same in both forms

    def __post_init__(self) -> None:
        if not self.branches or not self.kernel or not self.stride:
            raise UsageError(f"The region {self.name} needs at least one branch, a kernel size and a stride.")


@dataclass(frozen=True)
class Unchanged:
    """A module that was not collapsed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Check:
    """One comparison with the float64 reference."""

    subject: str  # such as "Plain form"
    inputs: str  # such as "360 validation images"
    dtype: str  # of the checked network
    relative_error: float  # against the float64 reference
    absolute_error: float  # largest absolute error against the float64 reference
    tolerance: float  # bound on the relative error
    tolerance_origin: str  # how that bound was derived
    passed: bool  # whether the error is within the tolerance
    reason: str  # the outcome in words
    reference_error: float | None = None  # relative error of the train form itself in that dtype; None if not measured
    agree: int | None = None  # number of equal predictions; None if there are no predictions
    total: int | None = None  # number of predictions compared


@dataclass(frozen=True)
class Timing:
    """The time of one form: seconds per batch, and the speed-up over the train form, whose own is 1."""

    name: str
    role: Role
    median_seconds: float
    q1_seconds: float
    q3_seconds: float
    speedup: float
    speedup_q1: float
    speedup_q3: float
    batch: int
    rounds: int


@dataclass(frozen=True)
class Sample:
    """A validation image as rows of gray values in [0, 255], and the prediction of the plain form.

    ``truth`` and ``predicted`` are class indices; ``confidence`` is the softmax of the predicted class.
    """

    pixels: tuple[tuple[int, ...], ...]
    truth: int
    predicted: int
    confidence: float

    def __post_init__(self) -> None:
        rows = self.pixels
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise UsageError("The pixels of a sample must be non-empty rows of equal length.")
        if any(not 0 <= value <= 255 for row in rows for value in row):
            raise UsageError("The pixels of a sample must be gray values from 0 to 255.")

    @property
    def correct(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.truth == self.predicted


@dataclass(frozen=True)
class File:
    """A file in the folder of the report: its name, its size in bytes, and its purpose."""

    name: str
    bytes: int
    purpose: str


@dataclass(frozen=True)
class NextCommand:
    """A command to try next, and what it does."""

    command: str
    purpose: str


@dataclass(frozen=True)
class Report:
    """The content of ``report.json``. ``evidence`` and ``timings`` are shown in their order.

    The first check supplies the headline figures; the report passes if all checks do. ``created`` is an ISO 8601 time,
    ``command`` reproduces the run.

    Raises:
        UsageError: the schema version is another one, the confusion matrix is not square, or a sample has a class
            index out of range.
    """

    created: str
    command: str
    seed: int
    model: Model
    data: Data
    training: Training
    regions: tuple[Region, ...]
    left: tuple[Unchanged, ...]  # modules that were left unchanged
    evidence: tuple[Check, ...]
    timings: tuple[Timing, ...]
    samples: tuple[Sample, ...]
    files: tuple[File, ...]  # includes report.json and report.html themselves
    next_commands: tuple[NextCommand, ...]
    environment: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        count = len(self.data.classes)
        square = len(self.training.confusion) == count and all(len(row) == count for row in self.training.confusion)
        if self.schema_version != SCHEMA_VERSION:
            raise UsageError(
                f"The report has schema version {self.schema_version}, but only version {SCHEMA_VERSION} can be read: "
                "use the version of repvgg that wrote it."
            )
        if not square:
            raise UsageError(f"The confusion matrix of {count} classes must have {count} rows of {count} counts.")
        if any(not 0 <= index < count for sample in self.samples for index in (sample.truth, sample.predicted)):
            raise UsageError(f"The class indices of a sample must be in [0, {count}).")

    @property
    def passed(self) -> bool:
        """Whether there was at least one check, and all of them passed."""
        return bool(self.evidence) and all(check.passed for check in self.evidence)

    @property
    def num_failed(self) -> int:
        """Number of failed checks."""
        return sum(not check.passed for check in self.evidence)

    def timing(self, role: Role) -> Timing | None:
        """Return the first timing of that role, or None."""
        return next((timing for timing in self.timings if timing.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json.dumps(..., allow_nan=False)`` accepts."""
        data: dict[str, Any] = json_ready(self)
        for epoch in data["training"]["history"]:
            if epoch["val_loss"] is None:  # a report that was written before there was this field
                del epoch["val_loss"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Build a report from the result of :meth:`to_dict`.

        Raises:
            UsageError: a key is missing, unknown or of the wrong type; the text says which.
        """
        report: Report = from_plain(cls, data, "report")
        return report
