"""The learning curve of a run: a picture and a table of its epochs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from repvgg._files import atomic_write, write_text
from repvgg.training.callbacks import EpochRecord

CSV, PICTURE = "log.csv", "curve.png"


def write_log(folder: Path, history: Sequence[EpochRecord]) -> Path:
    """Write ``log.csv``, one row an epoch, wholly or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochRecord)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in history)
    return write_text(folder / CSV, text.getvalue(), overwrite=True)


def draw_curve(folder: Path, history: Sequence[EpochRecord], title: str) -> Path:
    """Draw ``curve.png``: loss and held-out accuracy over the epochs, with the learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [record.epoch for record in history]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    best = max(history, key=lambda record: record.held_out_accuracy)
    above.plot(epochs, [record.loss for record in history], color="tab:orange")
    above.set_ylabel("training loss", color="tab:orange")
    above.set_title(title, loc="left")
    right = above.twinx()
    right.plot(epochs, [100 * record.held_out_accuracy for record in history], color="tab:blue")
    right.set_ylabel("held-out accuracy (%)", color="tab:blue")
    right.annotate(
        f"best {best.held_out_accuracy:.2%}",
        (best.epoch, 100 * best.held_out_accuracy),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
    )
    below.plot(epochs, [record.lr for record in history], color="tab:gray")
    below.set(xlabel="epoch", ylabel="learning rate")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    with atomic_write(folder / PICTURE, overwrite=True) as part:
        figure.savefig(part, dpi=120, format="png")
    return folder / PICTURE
