"""What ``repvgg predict`` does with a segmentation network: a mask and an overlay for each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from repvgg._files import check_output
from repvgg._progress import progress_bar
from repvgg.errors import OutputError, RepvggError, UnsupportedError, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repvgg.checkpoints import Metadata
    from repvgg.training import SegmentationInference

    Run = Callable[[Tensor], Tensor]

_MOST_SIZES = 4  # of images that are compiled for; PyTorch runs the others


class PredictedMask(NamedTuple):
    """The outcome for one image."""

    file: Path
    shares: list[tuple[int, float]]  # class and its share of the pixels, the largest first
    mask: Path | None  # the files that were written
    overlay: Path | None


class OutputNames(NamedTuple):
    """The files of one image."""

    mask: Path
    overlay: Path


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A segmentation network, ready to run."""

    run: Run  # images (N, C, H, W) to logits (N, K, H, W)
    about: Metadata
    inference: SegmentationInference


def output_names(files: Sequence[Path], folder: Path) -> list[OutputNames]:
    """Return where the masks of ``files`` go: NAME.png and NAME-overlay.jpg, with NAME as short as it is unique."""
    for name_of in (lambda file: file.stem, lambda file: file.name, lambda file: f"{file.parent.name}-{file.name}"):
        names = [name_of(file) for file in files]
        if len(set(names)) == len(names):
            break
    else:
        seen: Counter[str] = Counter()
        for index, name in enumerate(names):
            seen[name] += 1
            names[index] = f"{name}-{seen[name]}" if seen[name] > 1 else name
    return [OutputNames(folder / f"{name}.png", folder / f"{name}-overlay.jpg") for name in names]


def prepare_outputs(names: Sequence[OutputNames], folder: Path, *, overwrite: bool) -> None:
    """Create the folder, and refuse files that exist, before any image is predicted.

    Raises:
        OutputExistsError: a file exists, and ``overwrite`` is not set.
        OutputError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be created: {error.strerror or error}.") from error
    for path in (path for pair in names for path in pair):
        check_output(path, overwrite=overwrite)


def predict_files(
    segmenter: Segmenter, files: Sequence[Path], names: Sequence[OutputNames] | None, *, overwrite: bool
) -> Iterator[PredictedMask | tuple[Path, str]]:
    """Predict the mask of each file in turn, and write it with an overlay; yield the outcome, or why a file failed.

    Args:
        segmenter: the network.
        files: the images.
        names: where to write; None writes nothing.
        overwrite: replace files.
    """
    import numpy as np
    import torch

    from repvgg._files import atomic_write
    from repvgg.data import CorruptImage, read_whole_image
    from repvgg.data.label_sets import voc_colours
    from repvgg.data.mask_images import overlay, write_mask

    about = segmenter.about
    palette = about.palette or voc_colours(about.num_classes).tolist()
    classes = class_names(about)
    config = about.data_config()
    with progress_bar("images") as on_progress, torch.inference_mode():
        for index, file in enumerate(files):
            image = read_whole_image(file, config, about.in_channels)
            if isinstance(image, CorruptImage):
                yield file, image.reason
            else:
                pixels, x_NCHW = image
                scores = segmenter.inference.scores(segmenter.run, x_NCHW)
                mask = scores.argmax(1)[0].cpu().numpy().astype(np.uint8)
                counts = np.bincount(mask.reshape(-1), minlength=about.num_classes)
                order = [int(one) for one in np.argsort(-counts, kind="stable") if counts[one]]
                mask_path = overlay_path = None
                if names is not None:
                    mask_path, overlay_path = names[index]
                    write_mask(mask_path, mask, palette, overwrite=overwrite)
                    rgb = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
                    with atomic_write(overlay_path, overwrite=overwrite) as part:
                        overlay(rgb, mask, palette, classes).save(part, "JPEG", quality=92)
                yield PredictedMask(file, [(one, counts[one] / mask.size) for one in order], mask_path, overlay_path)
            on_progress(index + 1, len(files))


def class_names(about: Metadata) -> tuple[str, ...]:
    """Return the names of the classes, their numbers if the file has none."""
    return about.classes or tuple(f"class {index}" for index in range(about.num_classes))


def compiled(model: nn.Module, engine: str) -> tuple[Run, Callable[[], str]]:
    """Return a function that runs ``model`` on images, and one that says what ran.

    The engine compiles for each size of images on first use. Where it cannot, and for more than a few sizes, PyTorch
    runs; the text then says why.

    Raises:
        RepvggError: ``engine`` is "repvgg", and it does not support the network (when the function is called).
    """
    if engine == "torch":
        return model, lambda: "torch"
    state = _EngineState(model, engine == "repvgg")
    return state, state.describe


class _EngineState:
    def __init__(self, model: nn.Module, required: bool) -> None:
        self._model, self._required = model, required
        self._compiled: dict[tuple[int, ...], Any] = {}  # by shape of the images, the last used last
        self._problem = ""
        self._in_torch = 0

    def __call__(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if not self._problem and (shape in self._compiled or len(self._compiled) < _MOST_SIZES or self._required):
            try:
                return self._in_engine(images, shape)
            except (RepvggError, RuntimeError) as error:  # the latter by LLVM
                if self._required:
                    raise
                self._problem = first_line(error)
        self._in_torch += 1
        logits: Tensor = self._model(images)
        return logits

    def _in_engine(self, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        import repvgg.engine

        latest = next(reversed(self._compiled.values()), None)
        network = self._compiled.pop(shape, latest)
        logits: Tensor | None = None
        if network is not None:
            with suppress(UnsupportedError):  # the network depends on the size, and was compiled for another one
                logits = network(images)
        if logits is None:
            network = repvgg.engine.compile(self._model, shape)
            logits = network(images)
        self._compiled[shape] = network
        while len(self._compiled) > _MOST_SIZES:  # each has its memory
            del self._compiled[next(iter(self._compiled))]
        return logits

    def describe(self) -> str:
        if self._problem:
            return f"torch ({self._problem})"
        if self._in_torch:
            return f"repvgg, torch after the first {_MOST_SIZES} sizes of images"
        return "repvgg"
