"""The page of a training run, ``report.html``, from the files that :func:`repvgg.training.run` leaves in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from repvgg._files import write_text
from repvgg.measure import environment
from repvgg.studies.report.render import render_page, training_charts
from repvgg.studies.report.schema import Epoch, File
from repvgg.studies.report.segmentation_page import SegmentationPage, epochs_of
from repvgg.training.samples import SAMPLES_FOLDER, read_samples

PAGE = "report.html"
_MOST_CLASSES = 50  # rows of the table by class
_PURPOSES = {
    "train.safetensors": "the trained model with its branches: train it further, or convert it again",
    "plain.safetensors": "the plain model, one convolution per block: deploy this one",
    "best.safetensors": "the model after the epoch with the highest validation accuracy",
    "int8.onnx": "the plain model in 8-bit integers (QDQ), as it was trained: for ONNX Runtime and OpenVINO",
    "int8.safetensors": "the same integers, for repvgg.quantization.load_quantized",
    "config.yaml": "every setting: repvgg train --config config.yaml repeats the run",
    "last.ckpt": "the state of the training, from which --resume continues",
    "log.csv": "the numbers of each epoch, for spreadsheets",
    "curve.png": "the learning curve as a picture",
    "report.json": "every number of this page, for programs",
}


class _ClassRow(NamedTuple):
    name: str
    correct: int
    images: int
    confused: str  # the class that it is most often taken for; empty if all are correct
    times: int


def write_run_page(folder: Path) -> Path:
    """Write the page of a finished run into its folder, and return its path.

    Raises:
        OutputError: it cannot be written.
        MissingDependencyError: Jinja2 or Matplotlib is not installed.
    """
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    sizes = {name: (folder / name).stat().st_size for name in _PURPOSES if (folder / name).exists()}
    page = _segmentation_page(folder, report, sizes).render() if "palette" in report else _render(report, sizes)
    return write_text(folder / PAGE, page, overwrite=True)


def _segmentation_page(folder: Path, report: Mapping[str, Any], sizes: Mapping[str, int]) -> SegmentationPage:
    config, agreement = report["config"], report["mask_agreement"]
    name, recipe = _title(config)
    return SegmentationPage(
        name=name,
        headline=f"Trained on {config['data']['uri']} by the recipe {recipe}.",
        created=report["created"],
        command=report["command"],
        classes=report["classes"],
        palette=report["palette"],
        forms=_forms(report),
        ignore_index=report["ignore_index"],
        agreement=None if agreement is None else (agreement["same"], agreement["pixels"]),
        evidence=report.get("evidence"),
        samples=read_samples(folder / SAMPLES_FOLDER, report["samples"]),
        history=epochs_of(report["history"]),
        seconds=report["seconds"],
        skipped=report["skipped_images"],
        files=[File(name, sizes[name], _PURPOSES[name]) for name in sizes],
        facts={name: value for name, value in _flat(config) if value not in (None, "", {}, [])},
    )


def _title(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the model and of the recipe."""
    return config["model"] or Path(config["init"] or "model").stem, config["recipe"] or "custom"


def _forms(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of the forms of the model by their names."""
    plain = report["plain_form"]
    forms = (
        {"model": report["train_form"]} if plain is None else {"train form": report["train_form"], "plain form": plain}
    )
    return {**forms, "int8": report["int8"]} if "int8" in report else forms


def _render(report: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    config = report["config"]
    history = tuple(
        Epoch(row["epoch"], float(row["loss"]), row["held_out_accuracy"], _finite(row.get("held_out_loss")))
        for row in report["history"]
    )
    name, recipe = _title(config)
    classes = _class_rows(report["classes"], report["train_form"]["confusion"])
    return render_page(
        "run.html.j2",
        created=report["created"],
        machine=environment(),
        name=name,
        recipe=recipe,
        data=config["data"]["uri"],
        history=history,
        charts=training_charts(history),
        result=report["train_form"],
        forms=_forms(report),
        evidence=report.get("evidence"),
        seconds=report["seconds"],
        skipped=report["skipped_images"],
        class_rows=classes[:_MOST_CLASSES],
        num_classes=len(classes),
        files=[File(name, sizes[name], _PURPOSES[name]) for name in sizes],
        command=report["command"],
        facts={name: value for name, value in _flat(config) if value not in (None, "", {}, [])},
    )


def _finite(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _class_rows(names: list[str], confusion: list[list[int]]) -> list[_ClassRow]:
    """Return a row per class, those with the lowest accuracy first if there are many."""
    rows = []
    for index, (name, counts) in enumerate(zip(names, confusion, strict=True)):
        others = [(count, other) for other, count in enumerate(counts) if other != index and count]
        times, other = max(others, key=lambda pair: pair[0], default=(0, 0))
        rows.append(_ClassRow(name, counts[index], sum(counts), names[other] if times else "", times))
    if len(rows) > _MOST_CLASSES:
        rows.sort(key=lambda row: row.correct / row.images if row.images else math.inf)
    return rows


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in config.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
