"""The command ``repvgg quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def quickstart(
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FOLDER")] = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train a small network on handwritten digits, collapse, verify, export and time it, and write a report.

    Takes a minute or two on 2 CPU cores. Writes a folder with both forms of the model, an ONNX file and a report to
    open in a browser. Nothing is downloaded. An interrupted run leaves nothing.

    Args:
        out: folder to write; default: runs/quickstart, or the next unused name beside it.
        seed: of all random numbers; the same seed gives the same weights bit for bit.
        overwrite: replace the folder if it exists.
    """
    from repvgg.errors import require

    for package in (
        "PIL",
        "lightning",
        "torchvision",
        "sklearn",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "jinja2",
        "matplotlib",
    ):
        require(package, "study")  # before training, not after it

    from repvgg.studies.quickstart import run

    run(out, seed, overwrite=overwrite)
