"""LiteRT (TensorFlow Lite): refused, with the reason and what to do instead."""

from __future__ import annotations

from repvgg.deploy.targets import Exported, ExportRequest, export_target
from repvgg.errors import UnsupportedError


def export(request: ExportRequest) -> Exported:
    """Raise UnsupportedError: the converter cannot be installed with the PyTorch that this library is tested with."""
    raise UnsupportedError(
        f"LiteRT files are not written: {export_target('litert').why_not_run}. Export --to pt2, and convert that file "
        "in an environment of its own."
    )
