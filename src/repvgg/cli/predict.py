"""``repvgg predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from repvgg._progress import busy
from repvgg.cli._options import Checkpoint, InputSize, JsonFlag, Number
from repvgg.cli._output import write_json, write_line
from repvgg.errors import CheckpointError, RepvggError, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from repvgg.checkpoints import Metadata
    from repvgg.data import DataConfig
    from repvgg.models import RepVGG

    Run: TypeAlias = Callable[[Tensor], Tensor]
    TopClasses: TypeAlias = list[tuple[float, int]]  # (probability, class index), the most probable first

_BATCH = 16


def predict(
    checkpoint: Checkpoint,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    top: int = 5,
    engine: Literal["auto", "torch", "repvgg"] = "auto",
    input_size: InputSize = None,
    crop_fraction: float = 0.875,
    threads: Number = None,
    as_json: JsonFlag = False,
) -> None:
    """Predict the most probable classes of image files.

    A checkpoint in the train form is converted first; images are resized and cropped as by 'repvgg eval'. The engine
    "repvgg" is this library's; "auto" uses it if it is installed and supports the model. The output names the engine
    that ran.

        repvgg predict plain.safetensors cat.jpg holidays/

    Args:
        checkpoint: the file, of this library or another one.
        images: files, or folders of them.
        top: classes per image.
        engine: what runs the model.
        input_size: height and width (default: from the checkpoint).
        crop_fraction: the central crop as a fraction of the short side.
        threads: number of CPU threads (default: PyTorch's).
        as_json: print JSON.
    """
    from repvgg._contexts import num_threads
    from repvgg.data import DataConfig, list_images
    from repvgg.models import collapse_loaded, load

    if min(top, input_size or 1, threads or 1) < 1:
        raise UsageError("--top, --input-size and --threads are all at least 1.")
    if not images:
        raise UsageError("Give image files, or folders of them, after the checkpoint.")
    files = list_images(images)
    loaded = load(checkpoint)
    about = loaded.metadata
    config = DataConfig(crop_fraction=crop_fraction, mean=about.mean or None, std=about.std or None)
    size = input_size or about.input_size
    model = (loaded if about.form == "plain" else collapse_loaded(loaded)).model.float().eval()
    shape = (min(_BATCH, len(files)), about.in_channels, size, size)
    with num_threads(threads):
        run, ran = _compile(model, shape, engine)
        found = _predict(files, config, shape, run, min(top, about.num_classes))
    if as_json:
        write_json({"engine": ran, "model": about.model, "images": _as_data(files, found, about)})
    else:
        _print(files, found, about)
        write_line(f"{about.model}, plain form, {size} x {size}, engine {ran}")


def _compile(model: RepVGG, shape: tuple[int, int, int, int], engine: str) -> tuple[Run, str]:
    """Return the function to call on images, and the name of the engine behind it."""
    import repvgg.engine

    if engine == "torch":
        return model, "torch"
    try:
        return repvgg.engine.compile(model, shape), "repvgg"
    except (RepvggError, RuntimeError) as error:  # the latter by LLVM
        if engine == "repvgg":
            raise
        return model, f"torch ({first_line(error)})"


def _predict(
    files: Sequence[Path], config: DataConfig, shape: tuple[int, int, int, int], run: Run, top: int
) -> list[TopClasses]:
    import torch

    from repvgg.data import read_images

    batch, channels, size, _ = shape
    found: list[TopClasses] = []
    with busy("Predicting"), torch.inference_mode():
        for begin in range(0, len(files), batch):
            logits = run(read_images(files[begin : begin + batch], config, size, channels))
            if not logits.isfinite().all():
                raise CheckpointError("The model returns NaN or infinity: its weights are broken.")
            values, numbers = logits.double().softmax(1).topk(top)
            found += [list(zip(*row, strict=True)) for row in zip(values.tolist(), numbers.tolist(), strict=True)]
    return found


def _name(about: Metadata, number: int) -> str:
    return about.classes[number] if about.classes else f"class {number}"


def _as_data(files: Sequence[Path], found: Sequence[TopClasses], about: Metadata) -> list[dict[str, Any]]:
    return [
        {
            "file": str(path),
            "top": [{"class": _name(about, number), "index": number, "probability": value} for value, number in row],
        }
        for path, row in zip(files, found, strict=True)
    ]


def _print(files: Sequence[Path], found: Sequence[TopClasses], about: Metadata) -> None:
    width = max(len(_name(about, number)) for row in found for _, number in row)
    for path, row in zip(files, found, strict=True):
        write_line(str(path))
        for value, number in row:
            write_line(f"  {_name(about, number):{width}}  {100 * value:6.2f}%")
