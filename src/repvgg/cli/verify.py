"""``repvgg verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from repvgg.checkpoints import Metadata


def verify(
    reference: Annotated[Path, tyro.conf.Positional],
    candidate: Annotated[Path, tyro.conf.Positional],
    batch: int = 4,
    batches: int = 3,
    input_size: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """Judge whether two models are the same function; exit code 0 if they are and 1 if not.

    The reference runs in float64, the candidate as it is, on random images that make borders count. The evidence
    names the layers that err most.

    Args:
        reference: a checkpoint, the model as it should be.
        candidate: a checkpoint or an .onnx file, the model to judge.
        batch: images a batch.
        batches: how many; each after the first has another, odd size (an .onnx file gets one size only).
        input_size: height and width of the first batch; without it what the reference says.
        tolerance: largest relative error that passes; without it a rule that depends on the dtype.
        seed: of the random images.
        as_json: print the evidence as JSON.
    """
    from repvgg.models import load
    from repvgg.verify import border_inputs
    from repvgg.verify import verify as judge

    wanted = load(reference)
    given = _candidate(candidate, wanted.metadata)
    size = input_size or wanted.metadata.input_size
    fixed = candidate.suffix == ".onnx"
    images = border_inputs((batch, wanted.metadata.in_channels, size, size), batches=1 if fixed else batches, seed=seed)
    evidence = judge(wanted.model, given, images, tolerance=tolerance)
    sys.stdout.write((json.dumps(evidence.to_dict(), indent=1) if as_json else repr(evidence)) + "\n")
    return 0 if evidence.passed else 1


def _candidate(path: Path, wanted: Metadata) -> Any:
    """The model or session in a file, for the images that the reference takes.

    Raises:
        CheckpointError: it takes other images or tells other classes apart.
    """
    from repvgg.errors import CheckpointError
    from repvgg.models import load

    if path.suffix == ".onnx":
        from repvgg.deploy import OnnxRunner

        return OnnxRunner(path)
    given = load(path)
    ours, theirs = (wanted.in_channels, wanted.num_classes), (given.metadata.in_channels, given.metadata.num_classes)
    if ours != theirs:
        raise CheckpointError(
            f"{str(path)!r} maps {theirs[0]} channels to {theirs[1]} classes, and the reference {ours[0]} to {ours[1]}."
        )
    return given.model
