"""INT8: what the settings of ONNX Runtime, NNCF and this library cost, in accuracy, size and time.

    repvgg study int8
    repvgg study int8 --checkpoints a=runs/a b=runs/b --trained a=runs/a-qat --data imagefolder:cifar10 --rounds 0
    repvgg study int8 --rows ours nncf --threads 1

Without --checkpoints it trains the network of the quickstart first. Expected on 2 cores: 5 minutes. A folder takes more
networks and rows later: cells that it has are not measured again. Name the earlier ones again: the report shows the
networks and rows of the last command.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from repvgg.checkpoints import Metadata
from repvgg.collapse import reparameterize
from repvgg.data import DataConfig, is_mask_uri
from repvgg.deploy.int8 import RuntimeResult, evaluate_int8
from repvgg.deploy.onnx import export_onnx
from repvgg.errors import ExportError, MissingDependencyError, NothingFoldedWarning, UsageError, first_line
from repvgg.measure import RunSettings
from repvgg.models import load
from repvgg.quantization import Reference
from repvgg.quantization.images import open_quantization_images
from repvgg.studies.base import ProgressReporter, Study, check_positive
from repvgg.studies.int8_rows import FLOAT, OURS, ROWS, TRAINED, Row, Subject, as_key, trained_row
from repvgg.studies.int8_tables import int8_outcome
from repvgg.studies.store import Cell, CellStore

_DIGITS = "digits"
_SEPARATOR = "--"  # of network and row in the key of a cell; as_key makes it in neither
_TRAINED_FILE = "int8.onnx"  # in the run folder of quantization-aware training
_WEIGHT_FILES = ("train.safetensors", "plain.safetensors", "best.safetensors")  # of a run folder, the last first choice


@dataclass(frozen=True)
class Int8Settings:
    """Settings of the study of INT8.

    Attributes:
        run: device, dtype, memory format and threads.
        batch: images in a timed call.
        rounds: how often each file is timed, beside the float file; 0 does not time.
        checkpoints: run folders or checkpoints, each as PATH or NAME=PATH; default: the quickstart's network, which is
            trained first. The int8.onnx that quantization-aware training leaves in its folder becomes a row.
        trained: run folders of quantization-aware training, each as NAME=PATH with the name of the checkpoint that it
            started from, whose float network its integers are compared with.
        data: labelled images, or images with masks; the training split calibrates, the validation split evaluates;
            default: digits.
        input_size: height and width of the images; default: of the checkpoint.
        calibration_images: random training images.
        test_images: random validation images; default: all.
        baseline_images: how many of them rows are compared on, other than float32, all steps of this library (with
            rescaled channels, too) and trained integers; default: all of them.
        rows: names of rows, or what they begin with: ours, nncf, onnxruntime, trained, rescaled; default: all.
        seed: of the quickstart's training.

    Raises:
        UsageError: a number is below 1, a row does not exist, a checkpoint is named twice, or the device is no CPU.
    """

    run: RunSettings = field(default_factory=RunSettings)
    batch: int = 1
    rounds: int = 10
    checkpoints: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    data: str | None = None
    input_size: int | None = None
    calibration_images: int = 128
    test_images: int | None = None
    baseline_images: int | None = None
    rows: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(
            batch=self.batch,
            input_size=self.input_size,
            calibration_images=self.calibration_images,
            test_images=self.test_images,
            baseline_images=self.baseline_images,
        )
        if self.rounds < 0:
            raise UsageError(f"rounds must be at least 0, got {self.rounds}.")
        if self.run.device != "cpu" or self.run.dtype != "float32" or self.run.compile:
            raise UsageError(
                "Integers are measured on the CPU, beside float32: leave out --device, --dtype, --compile."
            )
        names = [name for name, _ in self.named_checkpoints]
        if len(set(names)) < len(names):
            raise UsageError("Two checkpoints have one name: give them as NAME=PATH.")
        for name, path in self._named_trainings:
            if name not in names:
                raise UsageError(f"No checkpoint is named {name!r}: give --trained NAME={path} with a name of one.")
        every = [[row.key for row in self._all_rows(name)] for name in names]
        if any(len(set(keys)) < len(keys) for keys in every):
            raise UsageError("Two trainings of one checkpoint are in folders of one name: rename one of them.")
        for chosen in self.rows:
            if not any(key.startswith(chosen) for keys in every for key in keys):
                families = "ours, nncf, onnxruntime, trained, rescaled"
                raise UsageError(f"No row begins with {chosen!r}: take {families}, or a name of one.")
        if self.checkpoints and self.data is None:
            raise UsageError("There is nothing to calibrate on: give --data, such as imagefolder:PATH.")

    @property
    def named_checkpoints(self) -> list[tuple[str, Path | None]]:
        """Name and path of each network; None is the quickstart's, which the study trains."""
        return [_named(text) for text in self.checkpoints] or [(_DIGITS, None)]

    def rows_of(self, network: str) -> tuple[Row, ...]:
        """Return the rows to measure of a network: float always, and that of a training if it left integers."""
        path = dict(self.named_checkpoints)[network]
        integers = path / _TRAINED_FILE if path is not None else None
        left_out = set() if integers is not None and integers.is_file() else {TRAINED}
        return tuple(
            replace(row, source=integers) if row is TRAINED else row
            for row in self._all_rows(network)
            if row is FLOAT or (row not in left_out and (not self.rows or row.key.startswith(self.rows)))
        )

    def _all_rows(self, network: str) -> list[Row]:
        trained = [trained_row(path / _TRAINED_FILE) for name, path in self._named_trainings if name == network]
        return [each for row in ROWS for each in ((row, *trained) if row is TRAINED else (row,))]

    @property
    def _named_trainings(self) -> list[tuple[str, Path]]:
        return [_named(text) for text in self.trained]


def _named(text: str) -> tuple[str, Path]:
    name, _, rest = text.partition("=")
    path = Path(rest or text)
    if not rest:
        name = path.name if path.is_dir() else path.stem if path.parent == Path() else f"{path.parent.name}-{path.stem}"
    return as_key(name) or "network", path


def _weights_of(path: Path) -> Path:
    """Return the checkpoint at ``path``, or in the run folder ``path``.

    Raises:
        UsageError: there is none.
    """
    if path.is_dir():
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise UsageError(
                f"{str(path)!r} has none of {', '.join(_WEIGHT_FILES)}: name a run folder or a checkpoint."
            )
        return found[0]
    if not path.is_file():
        raise UsageError(f"There is no checkpoint {str(path)!r}: name a run folder or a file.")
    return path


def _resolve(settings: Int8Settings) -> Int8Settings:
    for _, path in settings.named_checkpoints:
        if path is not None:
            _weights_of(path)  # before anything is measured
    for _, path in settings._named_trainings:
        if not (path / _TRAINED_FILE).is_file():
            raise UsageError(f"{str(path)!r} has no {_TRAINED_FILE}: name a folder of 'repvgg train --recipe qat'.")
    names = [name for name, _ in settings.named_checkpoints]
    keys = [row.key for name in names for row in settings.rows_of(name)]
    if not all(any(key.startswith(chosen) for key in keys) for chosen in settings.rows):
        # Of the rows that exist, only that of a folder's own integers may be left out.
        raise UsageError(f"{names[0]!r} has no {_TRAINED_FILE}: give --trained {names[0]}=FOLDER.")
    return replace(settings, data=settings.data or "digits:")


def _measure(settings: Int8Settings, store: CellStore, reporter: ProgressReporter) -> None:
    networks = {name: path or _quickstart(settings, store, reporter) for name, path in settings.named_checkpoints}
    digests = {name: _digest(_weights_of(path)) for name, path in networks.items()}
    if any(_SEPARATOR not in key for key in store.values):
        raise UsageError(_by_earlier_version(store))
    for name, digest in digests.items():
        _check_weights(name, digest, settings, store)
    shown = {cell_key(name, row) for name in networks for row in settings.rows_of(name)}
    if others := {key.partition(_SEPARATOR)[0]: None for key in store.values if key not in shown}:
        names = ", ".join(others)
        reporter.message(f"The folder has more results of {names}: name these networks and rows again to show them.")
    total, done = sum(len(settings.rows_of(name)) for name in networks), 0
    for name, path in networks.items():
        rows = [row for row in settings.rows_of(name) if cell_key(name, row) not in store]
        done += len(settings.rows_of(name)) - len(rows)
        if rows:
            with tempfile.TemporaryDirectory() as folder:
                subject, reference = _load(settings, path, Path(folder))
                # Made when one of these rows is next: the outputs of the whole reference are known by then.
                of_baselines = cache(partial(_for_baselines, reference, settings))
                for row in sorted(rows, key=_priority):
                    compared = reference if any(_first(row)) else of_baselines()
                    origin = _origin(row, digest)
                    cell = _cell(row, subject, compared, settings, Path(folder) / f"int8{row.suffix}")
                    store.put(cell_key(name, row), {**cell, **origin})
                    reporter.message(f"{name}, {row.title}: {_summary(cell)}")
                    done += 1
                    reporter(done, total)
        reporter(done, total)


def _priority(row: Row) -> int:
    """Return the order of measuring: first what most is learned from, should the study be interrupted."""
    first = _first(row)
    return first.index(True) if any(first) else len(first)


def _first(row: Row) -> list[bool]:
    """Return which of the rows that are compared on all images a row is; the others have ``--baseline-images``."""
    return [row.key == OURS, row is FLOAT, row.family == "trained", row.key == f"rescaled-{OURS}"]


def _for_baselines(reference: Reference, settings: Int8Settings) -> Reference:
    return reference if settings.baseline_images is None else reference.first(settings.baseline_images)


def _quickstart(settings: Int8Settings, store: CellStore, reporter: ProgressReporter) -> Path:
    path = store.folder / "quickstart"
    if not path.exists():
        from repvgg.studies.quickstart import run

        store.create()
        reporter.message(f"training the network of the quickstart in {path}")
        run(path, settings.seed, console=Console(quiet=True))
    return path


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _origin(row: Row, digest: str) -> dict[str, str]:
    """Return the digests of the float weights that a row is compared with, and of the integers that it copies."""
    return {"weights": digest} | ({} if row.source is None else {"integers": _digest(row.source)})


def _check_weights(name: str, digest: str, settings: Int8Settings, store: CellStore) -> None:
    """Raise UsageError if cells of ``name`` were measured with other weights, or do not say with which."""
    for row in settings.rows_of(name):
        key, origin = cell_key(name, row), _origin(row, digest)
        if key not in store:
            continue
        if not origin.keys() <= store[key].keys():
            raise UsageError(_by_earlier_version(store))
        if any(store[key][entry] != value for entry, value in origin.items()):
            raise UsageError(
                f"{str(store.folder)!r} has results of {name!r} with other weights: give it another name, as "
                "NAME=PATH, or choose another folder."
            )


def _by_earlier_version(store: CellStore) -> str:
    folder = str(store.folder)
    return f"{folder!r} has results measured by an earlier version: choose another folder, or pass --overwrite."


def cell_key(network: str, row: Row) -> str:
    """Return the key of a cell, another one for each pair of network and row."""
    return f"{network}{_SEPARATOR}{row.key}"


def _load(settings: Int8Settings, path: Path, folder: Path) -> tuple[Subject, Reference]:
    loaded = load(_weights_of(path))
    images = open_quantization_images(
        _config(settings, loaded.metadata),
        _shape(settings, loaded.metadata),
        calibration=settings.calibration_images,
        selection=0,
        evaluation=settings.test_images,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        plain = reparameterize(loaded.model, images.calibration[:2])[0].float()
    float_file = folder / "float.onnx"
    export_onnx(plain, float_file, images.shape)
    trained = path / _TRAINED_FILE
    subject = Subject(plain, float_file, images.calibration, trained if trained.is_file() else None)
    return subject, Reference(plain, images.evaluation)


def _config(settings: Int8Settings, about: Metadata) -> DataConfig:
    return about.data_config(uri=settings.data)


def _shape(settings: Int8Settings, about: Metadata) -> tuple[int, int, int] | None:
    if settings.input_size is None and is_mask_uri(settings.data or ""):
        return None  # that of the images
    size = settings.input_size or about.input_size
    return about.in_channels, size, size


def _cell(row: Row, subject: Subject, reference: Reference, settings: Int8Settings, file: Path) -> Cell:
    """Quantize and evaluate."""
    start = time.perf_counter()
    try:
        row.write(subject, file)
        seconds = time.perf_counter() - start
        results = evaluate_int8(
            file,
            reference,
            runtimes=row.runtimes,
            rounds=settings.rounds,
            batch=settings.batch,
            float_file=subject.float_file,
        )
    except (ExportError, MissingDependencyError) as error:
        return {"failed": str(error)}
    except Exception as error:
        if row.family in ("ours", "float"):
            raise
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}  # of a library
    finally:
        files = list(file.parent.glob(f"{file.stem}.*"))  # OpenVINO's weights are in a file next to it
        size = sum(one.stat().st_size for one in files)
        for one in files:
            one.unlink()
    return {"bytes": size, "seconds": seconds, "runtimes": {one.runtime: _as_data(one) for one in results}}


def _as_data(result: RuntimeResult) -> dict[str, Any]:
    quality, latency = result.quality, result.latency
    data: dict[str, Any] = {
        "sqnr_db": quality.sqnr if math.isfinite(quality.sqnr) else None,
        "agreement": quality.agreement,
        "images": quality.images,
        "saturation_db": result.saturation,
    }
    if quality.accuracy is not None:
        one = quality.accuracy
        data["accuracy"] = {
            "reference": one.reference / one.images,
            "candidate": one.candidate / one.images,
            "difference": one.difference,
            "interval": list(one.interval),
        }
    if quality.segmentation is not None:
        pair = quality.segmentation
        data["miou"] = {
            "reference": pair.reference.miou,
            "candidate": pair.candidate.miou,
            "difference": pair.difference,
        }
    if latency is not None:
        data["latency"] = {
            "milliseconds": latency.milliseconds,
            "float_milliseconds": latency.float_milliseconds,
            "speedup": latency.speedup,
        }
    return data


def _summary(cell: Mapping[str, Any]) -> str:
    if "failed" in cell:
        return str(cell["failed"])
    parts = [
        f"{name} {one['agreement']:.2%}, {'∞' if one['sqnr_db'] is None else round(one['sqnr_db'], 1)} dB"
        for name, one in cell["runtimes"].items()
    ]
    return "; ".join(parts)


STUDIES = (
    Study(
        name="int8",
        title="INT8: settings of ONNX Runtime, NNCF and this library, side by side",
        about=(
            "Each row quantizes the plain form of the same network with the same calibration images, and its ONNX file "
            "is run in ONNX Runtime and in OpenVINO on the same validation images, which are others. Agreement is the "
            "share of images, or of pixels, whose class is that of the float network in PyTorch; SQNR is the "
            "signal-to-quantization-noise ratio of all logits. The difference of the accuracies is paired: its 95 % "
            "confidence interval comes from the images on which one network alone is right. A top-1 accuracy above "
            "that of the float network is chance.\n\n"
            "Saturation is what the integer kernels of ONNX Runtime lose against the same file in float arithmetic, "
            "on the first 512 images: CPUs without VNNI instructions add pairs of products of signed weights in 16 "
            "bits. Latency is that of a call, each file beside the float file of the same runtime in the same rounds. "
            "Steps of this library are added one at a time; every row is shown, the worse ones too. A network "
            "with randomly rescaled channels computes the same function, with scales up to 1000 times as large or as "
            "small."
        ),
        settings=Int8Settings,
        resolve=_resolve,
        measure=_measure,
        outcome=lambda settings, values: int8_outcome(
            {
                name: {row: values.get(cell_key(name, row)) for row in settings.rows_of(name)}
                for name, _ in settings.named_checkpoints
            },
            settings.batch,
        ),
        free_settings=frozenset({"checkpoints", "trained", "rows"}),
        extends=True,
    ),
)
