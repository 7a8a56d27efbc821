"""``repvgg verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from repvgg._progress import busy
from repvgg.cli._options import BatchSize, InputSize, JsonFlag
from repvgg.cli._output import write_json, write_line
from repvgg.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from repvgg.checkpoints import Metadata


def verify(
    reference: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REFERENCE")],
    candidate: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CANDIDATE")],
    batch: BatchSize = 4,
    batches: int = 3,
    input_size: InputSize = None,
    tolerance: Annotated[float | None, tyro.conf.arg(help_behavior_hint="")] = None,
    seed: int = 0,
    as_json: JsonFlag = False,
) -> int:
    """Check whether two models compute the same function; exit code 0 if they do and 1 if not.

    The reference runs in float64, the candidate in its dtype, on random images that reveal differences at borders. The
    output lists the layers with the largest errors.

        repvgg verify train.safetensors plain.safetensors
        repvgg verify train.safetensors plain.onnx --json

    Args:
        reference: a checkpoint.
        candidate: a checkpoint, or an exported file (.onnx, .pt2, …), to be compared with the reference. A .pt2,
            .torchscript or .pte file and a C library (its folder, or the .so) are programs: verify only those that you
            trust.
        batch: images per batch.
        batches: number of batches; each after the first has another, odd size (an exported file gets one size only).
        input_size: height and width of the first batch (default: from the files).
        tolerance: largest relative error that passes (default: depends on the dtype).
        seed: of the random images.
        as_json: print the evidence as JSON.
    """
    from repvgg.models import load
    from repvgg.verify import verify as run_verify

    expected = load(reference)
    actual = _load_candidate(candidate, expected.metadata)
    images = _images(actual, expected.metadata, batch, batches, input_size, seed)
    with busy("Verifying"):
        evidence = run_verify(expected.model, actual, images, tolerance=tolerance)
    if as_json:
        write_json(evidence.to_dict())
    else:
        write_line(repr(evidence))
    return 0 if evidence.passed else 1


def _load_candidate(path: Path, reference: Metadata) -> Any:
    """Return the model in a file, or the runner of an exported file.

    Raises:
        CheckpointError: it takes other images than the reference, or has other classes.
    """
    from repvgg.deploy import load_runner, target_of
    from repvgg.models import load

    if target_of(path):
        return load_runner(path)
    loaded = load(path)
    wanted = (reference.in_channels, reference.num_classes)
    found = (loaded.metadata.in_channels, loaded.metadata.num_classes)
    if wanted != found:
        raise CheckpointError(
            f"{str(path)!r} maps {found[0]} channels to {found[1]} classes, and the reference {wanted[0]} to "
            f"{wanted[1]}."
        )
    return loaded.model


def _images(
    candidate: Any, reference: Metadata, batch: int, batches: int, input_size: int | None, seed: int
) -> list[Tensor]:
    from repvgg.verify import border_inputs

    if not -(2**63) <= seed < 2**63:
        raise UsageError(f"A seed has 64 bits at most: {seed} has more.")
    size = reference.input_size if input_size is None else input_size
    if not hasattr(candidate, "input_shape"):
        return border_inputs((batch, reference.in_channels, size, size), batches=batches, seed=seed)
    # An exported file has a dtype, and may fix the number and the size of images.
    number, _, *sides = candidate.input_shape if len(candidate.input_shape) == 4 else (None,) * 4
    height, width = (side if side and input_size is None else size for side in sides)
    shape = (number or batch, reference.in_channels, height, width)
    return border_inputs(shape, batches=1, seed=seed, dtype=candidate.dtype)
