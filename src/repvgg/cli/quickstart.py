"""``repvgg quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def quickstart(
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FOLDER")] = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Go the whole way once, on handwritten digits: train, collapse, verify, time, export, report.

    Takes a minute or two on 2 CPU cores and leaves a folder with both forms of the model, an ONNX file and a report
    to look at. Nothing is downloaded. Interrupted, it leaves nothing.

    Args:
        out: folder to write; without it runs/quickstart, or the next free name beside it.
        seed: of everything random; the same seed gives the same weights bit for bit.
        overwrite: replace the folder if it exists.
    """
    from repvgg.studies.quickstart import run

    run(out, seed, overwrite=overwrite)
