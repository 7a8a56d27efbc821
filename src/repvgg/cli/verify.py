"""``repvgg verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from repvgg.checkpoints import Metadata


def verify(
    reference: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")],
    candidate: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CANDIDATE")],
    batch: Annotated[int, tyro.conf.arg(metavar="IMAGES")] = 4,
    batches: int = 3,
    input_size: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="PIXELS")] = None,
    tolerance: Annotated[float | None, tyro.conf.arg(help_behavior_hint="")] = None,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Judge whether two models are the same function; exit code 0 if they are and 1 if not.

    The reference runs in float64, the candidate as it is, on random images that make borders count. The evidence
    names the layers that err most.

        repvgg verify train.safetensors plain.safetensors
        repvgg verify train.safetensors plain.onnx --json

    Args:
        reference: a checkpoint, the model as it should be.
        candidate: a checkpoint or an .onnx file, the model to judge.
        batch: images a batch.
        batches: how many; each after the first has another, odd size (an .onnx file gets one size only).
        input_size: height and width of the first batch; without it what the files say.
        tolerance: largest relative error that passes; without it a rule that depends on the dtype.
        seed: of the random images.
        as_json: print the evidence as JSON.
    """
    from repvgg.cli.terminal import busy, write_json, write_line
    from repvgg.models import load
    from repvgg.verify import verify as judge

    wanted = load(reference)
    given = _candidate(candidate, wanted.metadata)
    images = _images(given, wanted.metadata, batch, batches, input_size, seed)
    with busy("Verifying"):
        evidence = judge(wanted.model, given, images, tolerance=tolerance)
    if as_json:
        write_json(evidence.to_dict())
    else:
        write_line(repr(evidence))
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


def _images(given: Any, wanted: Metadata, batch: int, batches: int, input_size: int | None, seed: int) -> list[Tensor]:
    """Images that both sides take; an .onnx file may fix their number and size, and has a dtype of its own."""
    from repvgg.deploy import OnnxRunner
    from repvgg.errors import UsageError
    from repvgg.verify import border_inputs

    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"A seed has 64 bits at most: {seed} has more.")
    size = wanted.input_size if input_size is None else input_size
    if not isinstance(given, OnnxRunner):
        return border_inputs((batch, wanted.in_channels, size, size), batches=batches, seed=seed)
    number, _, *sides = given.input_shape if len(given.input_shape) == 4 else (None,) * 4
    height, width = (side if side and input_size is None else size for side in sides)
    shape = (number or batch, wanted.in_channels, height, width)
    return border_inputs(shape, batches=1, seed=seed, dtype=given.dtype)
