"""What ``report.json`` holds and ``report.html`` shows: frozen values, numbers in SI units, nothing but JSON in them.

``Report.to_dict()`` is what gets saved; ``Report.from_dict()`` reads it back and checks every field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from repvgg.errors import UsageError
from repvgg.studies.report.codec import decode, encode

SCHEMA_VERSION = 1

Role = Literal["train", "folded", "plain", "runtime"]


@dataclass(frozen=True)
class Model:
    """The network, and what it costs before and after; MACs are of one image of ``input_size``."""

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
    """The images: how many taught the model, how many were held out, and what the classes are called."""

    name: str
    train_count: int
    held_out_count: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Epoch:
    """One point of the learning curve: mean training loss, held-out accuracy in [0, 1]."""

    epoch: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Training:
    """The outcome of training. ``confusion[true][predicted]`` counts held-out images."""

    epochs: int
    seconds: float
    history: tuple[Epoch, ...]
    accuracy: float
    confusion: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Region:
    """Branches that became one convolution, in the order in which the network runs them.

    Attributes:
        name: where the region stands in the model, ``stages.0.1.conv``.
        branches: one description a branch, ``3x3 conv + BN``; they are summed.
        kernel: height and width of the resulting convolution.
        stride: vertical and horizontal.
        groups: of the resulting convolution.
        in_channels: of the resulting convolution.
        out_channels: of the resulting convolution.
        params_before: parameters of all branches.
        params_after: parameters of the convolution.
        error_made: relative error of this convolution alone, given the reference's input; None where not measured.
        error_arriving: relative error of its output when the whole plain network runs; None where not measured.
        then: what follows in both forms, unchanged; drawn after the sum.
    """

    name: str
    branches: tuple[str, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int
    params_before: int
    params_after: int
    error_made: float | None = None
    error_arriving: float | None = None
    then: str = "ReLU"

    def __post_init__(self) -> None:
        if not self.branches or not self.kernel or not self.stride:
            raise UsageError(f"The region {self.name} needs a branch, a kernel size and a stride at least.")


@dataclass(frozen=True)
class Left:
    """A part that stayed as it was, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Judgement:
    """One verdict of the judge, as figures.

    Attributes:
        subject: what was judged, ``plain form``.
        inputs: on what, ``360 held-out images``.
        dtype: it ran in, ``float32``.
        relative_error: against the float64 reference.
        absolute_error: largest, against the float64 reference.
        tolerance: bound on the relative error.
        tolerance_origin: where that bound comes from.
        passed: the verdict.
        reason: the verdict in words.
        reference_error: relative error of the train form itself in that dtype; None where not measured.
        agree: predictions that are the same; None where there is nothing to predict.
        total: predictions compared.
    """

    subject: str
    inputs: str
    dtype: str
    relative_error: float
    absolute_error: float
    tolerance: float
    tolerance_origin: str
    passed: bool
    reason: str
    reference_error: float | None = None
    agree: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Timing:
    """One form on the stopwatch: seconds a batch, and how many times as fast as the train form (which has 1)."""

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
    """A held-out image as rows of gray values 0..255, and what the plain form says of it.

    ``truth`` and ``predicted`` are indices into the classes; ``confidence`` is the predicted one's, in [0, 1].
    """

    pixels: tuple[tuple[int, ...], ...]
    truth: int
    predicted: int
    confidence: float

    def __post_init__(self) -> None:
        rows = self.pixels
        if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
            raise UsageError("The pixels of a sample are rows of one length, at least one pixel in all.")
        if any(not 0 <= value <= 255 for row in rows for value in row):
            raise UsageError("The pixels of a sample are gray values from 0 to 255.")

    @property
    def right(self) -> bool:
        """Whether the prediction is the truth."""
        return self.truth == self.predicted


@dataclass(frozen=True)
class File:
    """A file beside the report: its name relative to the folder, its size in bytes, and what it is for."""

    name: str
    bytes: int
    purpose: str


@dataclass(frozen=True)
class NextCommand:
    """A command worth trying next, and what it does."""

    command: str
    purpose: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. ``evidence`` and ``timings`` stand in the order in which they are shown.

    The first judgement is the headline figure; the verdict is that of all of them. ``created`` is an ISO 8601 time,
    ``command`` reproduces the run.
    """

    created: str
    command: str
    seed: int
    model: Model
    data: Data
    training: Training
    regions: tuple[Region, ...]
    left: tuple[Left, ...]
    evidence: tuple[Judgement, ...]
    timings: tuple[Timing, ...]
    samples: tuple[Sample, ...]
    files: tuple[File, ...]
    next_commands: tuple[NextCommand, ...]
    environment: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        count = len(self.data.classes)
        square = len(self.training.confusion) == count and all(len(row) == count for row in self.training.confusion)
        if self.schema_version != SCHEMA_VERSION:
            raise UsageError(f"This is a report of version {self.schema_version}; known is {SCHEMA_VERSION}.")
        if not square:
            raise UsageError(f"The confusion matrix of {count} classes has {count} rows of {count} counts.")
        if any(not 0 <= index < count for sample in self.samples for index in (sample.truth, sample.predicted)):
            raise UsageError(f"A sample names a class that is none of the {count}.")

    @property
    def passed(self) -> bool:
        """Whether something was judged, and all of it passed."""
        return bool(self.evidence) and all(judgement.passed for judgement in self.evidence)

    def timing(self, role: Role) -> Timing | None:
        """The first timing of that role, or None."""
        return next((timing for timing in self.timings if timing.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists and scalars that ``json.dumps(..., allow_nan=False)`` takes."""
        encoded: dict[str, Any] = encode(self)
        return encoded

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read what :meth:`to_dict` gave.

        Raises:
            UsageError: an entry is missing, unknown or of the wrong type; the text says which.
        """
        report: Report = decode(cls, data, "report")
        return report
