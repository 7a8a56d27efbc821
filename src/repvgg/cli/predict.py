"""``repvgg predict``."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from repvgg._files import check_output, write_text
from repvgg._progress import progress_bar
from repvgg.cli._mask_options import InferenceOptions
from repvgg.cli._options import Checkpoint, InputSize, JsonFlag, Number, OptionalFile
from repvgg.cli._output import write_json, write_line, write_warning
from repvgg.errors import CheckpointError, DataError, RepvggError, UsageError, first_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from repvgg.checkpoints import Metadata
    from repvgg.data import DataConfig
    from repvgg.deploy import LoadedProgram

    Run: TypeAlias = Callable[[Tensor], Tensor]
    TopClasses: TypeAlias = list[tuple[float, int]]  # (probability, class index), the most probable first
    Predictions: TypeAlias = list[tuple[Path, TopClasses]]
    Failures: TypeAlias = dict[str, str]  # the reason by file, as a clause: "is empty: it has 0 bytes"

_BATCH = 16
_SOME_FAILED = 1  # exit code
_NO_MASK_OPTIONS = InferenceOptions()


@dataclasses.dataclass(frozen=True, eq=False)
class _Classifier:
    run: Run  # images (N, C, H, W) to logits (N, K)
    about: Metadata
    engine: str  # what runs it, in words


@dataclasses.dataclass(frozen=True, eq=False)
class _MaskNetwork:
    run: Run  # images (N, C, H, W) to logits (N, K, H, W)
    what_ran: Callable[[], str]  # what runs it, in words, after it has run
    about: Metadata
    window: int | None = None  # pixels of a side, if it takes one size of images only


def predict(
    checkpoint: Checkpoint,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    top: int = 5,
    out: OptionalFile = None,
    classes: OptionalFile = None,
    engine: Literal["auto", "torch", "repvgg"] = "auto",
    input_size: InputSize = None,
    crop_fraction: float = 0.875,
    threads: Number = None,
    overwrite: bool = False,
    as_json: JsonFlag = False,
    masks: Annotated[InferenceOptions, tyro.conf.arg(name="")] = _NO_MASK_OPTIONS,
) -> int:
    """Predict the most probable classes of image files, or the class of each of their pixels.

    A checkpoint in the train form is converted first; exported files (.onnx, .ort, .xml, .pt2, .torchscript, .pte,
    .param, a C library or its folder) run as they are, each in its own runtime. Images are resized and
    cropped as by 'repvgg eval', and turned as their EXIF orientation says. The engine "repvgg" is this library's;
    "auto" uses it if it is installed and supports the model. The output names the engine that ran.

    A segmentation network writes two files for each image into the folder --out: a PNG whose pixels are class indices,
    with the colours as its palette, and the image with these colours over it and a legend. Without --out it lists the
    share of each class. Images keep their size.

    Files that cannot be read are listed with the reason, and the exit code is then 1.

        repvgg predict plain.safetensors cat.jpg holidays/
        repvgg predict plain.onnx holidays/ --top 1 --out predictions.csv
        repvgg predict segment.safetensors street/ --out masks/

    Args:
        checkpoint: the file, of this library or another one, or an exported one. A .pt2, .torchscript or .pte file and
            a C library (its folder, or the .so) are programs: run only those that you trust.
        images: files, or folders of them.
        top: classes per image.
        out: write a table to this .csv file, one row an image; or masks to this folder.
        classes: a text file with the name of each class on a line of its own (default: from the checkpoint).
        engine: what runs the model.
        input_size: height and width (default: from the checkpoint).
        crop_fraction: the central crop as a fraction of the short side.
        threads: number of CPU threads (default: PyTorch's).
        overwrite: replace the file given as --out, or files in that folder.
        as_json: print JSON.
        masks: see there.
    """
    from repvgg._contexts import num_threads

    if min(top, input_size or 1, threads or 1) < 1:
        raise UsageError("--top, --input-size and --threads are all at least 1.")
    if not images:
        raise UsageError("Give image files, or folders of them, after the checkpoint.")
    program = _load_program(checkpoint, engine, input_size, threads)
    segmenter = _segmentation_network(checkpoint, engine) if program is None else _segmentation_program(program, masks)
    if segmenter is not None:
        if input_size is not None:
            raise UsageError("A segmentation network takes images of any size: leave out --input-size.")
        if classes is not None:
            about = dataclasses.replace(segmenter.about, classes=_class_names(classes, segmenter.about))
            segmenter = dataclasses.replace(segmenter, about=about)
        with num_threads(threads):
            return _segment(segmenter, images, top, out, masks, overwrite=overwrite, as_json=as_json)
    if masks != _NO_MASK_OPTIONS:
        raise UsageError("--window, --stride, --flip, --scales, --tta are for segmentation networks: leave them out.")
    if out is not None:
        if out.suffix != ".csv":
            raise UsageError(f"Predictions are written as a table: end {str(out)!r} in .csv.")
        check_output(out, overwrite=overwrite)
    files, failures = _find(images)
    if not files:
        raise _nothing_read(failures)
    with num_threads(threads):
        if program is None:
            classifier = _load(checkpoint, engine, input_size, min(_BATCH, len(files)))
        else:
            classifier = _Classifier(program, program.metadata, program.runtime)
        about = classifier.about
        if classes is not None:
            about = dataclasses.replace(about, classes=_class_names(classes, about))
        config = about.data_config(crop_fraction=crop_fraction)
        found = _predict(files, config, about, classifier.run, min(top, about.num_classes), failures)
    if not found:
        raise _nothing_read(failures)
    if out is not None:
        write_text(out, _as_csv(found, failures, about, min(top, about.num_classes)), overwrite=overwrite)
    if as_json:
        failed = [{"file": file, "reason": reason} for file, reason in failures.items()]
        images_data = _as_data(found, about)
        write_json({"engine": classifier.engine, "model": about.model, "images": images_data, "failures": failed})
    else:
        if out is None:
            _print(found, about)
        size = f"{about.input_size} x {about.input_size}"
        write_line(f"{about.model}, {about.form} form, {size}, engine {classifier.engine}")
        if out is not None:
            write_line(f"wrote {out}: {len(found):,} images")
    return _warn_of(failures, len(found))


def _warn_of(failures: Failures, num_found: int) -> int:
    """List the files that could not be read, and return the exit code."""
    for file, reason in failures.items():
        write_warning(f"{file!r} {reason}")
    if failures:
        write_warning(f"{len(failures):,} of {num_found + len(failures):,} files could not be read")
    return _SOME_FAILED if failures else 0


def _load_program(path: Path, engine: str, input_size: int | None, threads: int | None) -> LoadedProgram | None:
    """Return an exported file in its runtime; None for a checkpoint."""
    from repvgg.deploy import load_program, target_of

    if target_of(path) is None:
        return None
    program = load_program(path, threads=threads)
    if engine not in ("auto", program.runtime):
        raise UsageError(f"{str(path)!r} runs in {program.runtime}: leave out --engine.")
    if input_size not in (None, program.metadata.input_size):
        raise UsageError(f"{str(path)!r} takes images of {program.metadata.input_size} pixels: leave out --input-size.")
    return program


def _segmentation_network(path: Path, engine: str) -> _MaskNetwork | None:
    """Return the plain form of a segmentation network; None if the checkpoint holds something else."""
    from repvgg.cli._predict_masks import compiled
    from repvgg.models import PSPNet, collapse_loaded, load

    loaded = load(path)
    if not isinstance(loaded.model, PSPNet):
        return None
    loaded = loaded if loaded.metadata.form == "plain" else collapse_loaded(loaded)
    return _MaskNetwork(*compiled(loaded.model.float().eval(), engine), loaded.metadata)


def _segmentation_program(program: LoadedProgram, masks: InferenceOptions) -> _MaskNetwork | None:
    """Return an exported segmentation network, whose images have one size; None if it is a classifier."""
    if not program.segments:
        return None
    size = program.metadata.input_size
    if masks.window not in (None, size):
        raise UsageError(f"This file takes images of {size} pixels, which are its windows: leave out --window.")
    return _MaskNetwork(program, lambda: program.runtime, program.metadata, window=size)


def _segment(
    network: _MaskNetwork,
    images: Sequence[Path],
    top: int,
    out: Path | None,
    masks: InferenceOptions,
    *,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Predict masks; the arguments are those of :func:`predict`."""
    from repvgg.cli._predict_masks import (
        PredictedMask,
        Segmenter,
        class_names,
        output_names,
        predict_files,
        prepare_outputs,
    )

    if out is not None and (out.suffix or (out.exists() and not out.is_dir())):
        raise UsageError(f"Masks are written to a folder, and {str(out)!r} names a file: give a folder as --out.")
    masks = masks if network.window is None else dataclasses.replace(masks, window=network.window)
    inference = masks.inference
    files, failures = _find(images)
    if not files:
        raise _nothing_read(failures)
    names = None
    if out is not None:
        names = output_names(files, out)
        prepare_outputs(names, out, overwrite=overwrite)
    run, what_ran, about = network.run, network.what_ran, network.about
    found: list[PredictedMask] = []
    for result in predict_files(Segmenter(run, about, inference), files, names, overwrite=overwrite):
        if isinstance(result, PredictedMask):
            found.append(result)
            if out is None and not as_json:
                shares = ", ".join(f"{class_names(about)[index]} {share:.1%}" for index, share in result.shares[:top])
                write_line(printable(f"{result.file}: {shares}"))
        else:
            failures[str(result[0])] = result[1]
    if not found:
        raise _nothing_read(failures)
    if as_json:
        rows = [
            {
                "file": str(one.file),
                "mask": None if one.mask is None else str(one.mask),
                "overlay": None if one.overlay is None else str(one.overlay),
                "shares": {class_names(about)[index]: share for index, share in one.shares},
            }
            for one in found
        ]
        failed = [{"file": file, "reason": reason} for file, reason in failures.items()]
        write_json({"engine": what_ran(), "model": about.model, "images": rows, "failures": failed})
    else:
        write_line(f"{about.model}, {about.form} form, {inference}, engine {what_ran()}")
        if out is not None:
            write_line(f"wrote {len(found):,} masks and overlays to {out}")
    return _warn_of(failures, len(found))


def _find(paths: Sequence[Path]) -> tuple[list[Path], Failures]:
    from repvgg.data import list_images

    files: list[Path] = []
    failures: Failures = {}
    for path in paths:
        try:
            files += list_images([path])
        except DataError as error:
            if len(paths) == 1:
                raise
            failures[str(path)] = f"is left out: {first_line(error)}" if path.exists() else "does not exist"
    return files, failures


def _nothing_read(failures: Failures) -> DataError:
    file, reason = next(iter(failures.items()))
    more = f", and {len(failures) - 1} more could not be read" if len(failures) > 1 else ""
    return DataError(f"{file!r} {reason}{more}: name images that can be read.")


def _load(path: Path, engine: str, input_size: int | None, batch: int) -> _Classifier:
    from repvgg.models import collapse_loaded, load

    loaded = load(path)
    loaded = loaded if loaded.metadata.form == "plain" else collapse_loaded(loaded)
    about = dataclasses.replace(loaded.metadata, input_size=input_size or loaded.metadata.input_size)
    run, ran = _compile(loaded.model.float().eval(), (batch, about.in_channels, *(2 * [about.input_size])), engine)
    return _Classifier(run, about, ran)


def _compile(model: nn.Module, shape: tuple[int, ...], engine: str) -> tuple[Run, str]:
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


def _class_names(path: Path, about: Metadata) -> tuple[str, ...]:
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The classes {str(path)!r} cannot be read: {first_line(error)}.") from error
    if len(names) != about.num_classes:
        raise UsageError(f"{str(path)!r} names {len(names)} classes, but the model has {about.num_classes}.")
    return names


def _predict(
    files: Sequence[Path], config: DataConfig, about: Metadata, run: Run, top: int, failures: Failures
) -> Predictions:
    """Return the most probable classes of each file that can be read, and add the others to ``failures``."""
    import torch

    from repvgg.data import read_usable_images

    found: Predictions = []
    with progress_bar("images") as on_progress, torch.inference_mode():
        for begin in range(0, len(files), _BATCH):
            part = files[begin : begin + _BATCH]
            images, usable, corrupt = read_usable_images(part, config, about.input_size, about.in_channels)
            failures |= {image.location: image.reason for image in corrupt}
            if usable:
                logits = run(images)
                if not logits.isfinite().all():
                    raise CheckpointError("The model returns NaN or infinity: its weights are broken.")
                values, numbers = logits.double().softmax(1).topk(top)
                rows = zip(values.tolist(), numbers.tolist(), strict=True)
                found += [(path, list(zip(*row, strict=True))) for path, row in zip(usable, rows, strict=True)]
            on_progress(min(begin + _BATCH, len(files)), len(files))
    return found


def _name(about: Metadata, number: int) -> str:
    return about.classes[number] if about.classes else f"class {number}"


def _as_data(found: Predictions, about: Metadata) -> list[dict[str, Any]]:
    return [
        {
            "file": str(path),
            "top": [{"class": _name(about, number), "index": number, "probability": value} for value, number in row],
        }
        for path, row in found
    ]


def _as_csv(found: Predictions, failures: Failures, about: Metadata, top: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = [(f"class_{rank}", f"probability_{rank}") for rank in range(1, top + 1)]
    writer.writerow(["file", *(title for pair in pairs for title in pair), "error"])
    for path, row in found:
        cells = [cell for value, number in row for cell in (_name(about, number), f"{value:.6f}")]
        writer.writerow([str(path), *cells, ""])
    for file, reason in failures.items():
        writer.writerow([file, *[""] * (2 * top), reason])
    # Names of files may be bytes that are no text.
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def _print(found: Predictions, about: Metadata) -> None:
    # Names of files and classes may have several lines.
    names = {number: printable(_name(about, number)) for _, row in found for _, number in row}
    width = max(map(len, names.values()))
    for path, row in found:
        write_line(printable(str(path)))
        for value, number in row:
            write_line(f"  {names[number]:{width}}  {100 * value:6.2f}%")
