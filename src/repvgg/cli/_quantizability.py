"""The page of ``repvgg quantize --report-only --html FILE``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg._progress import busy
from repvgg.cli._output import write_line
from repvgg.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

    from repvgg.cli._network import Network
    from repvgg.quantization import Quality, QuantizationSettings, StepReport
    from repvgg.quantization.images import QuantizationImages


def write_page(
    path: Path,
    network: Network,
    plain: nn.Module,
    images: QuantizationImages,
    steps: StepReport,
    settings: QuantizationSettings,
    *,
    overwrite: bool = False,
) -> None:
    """Quantize with all steps, and write what happens to each layer.

    Args:
        path: the page.
        network: what is quantized.
        plain: its plain form.
        images: to calibrate on, to compare granularities on, and to evaluate on.
        steps: what was measured on those to evaluate on.
        settings: of the quantization whose layers are shown.
        overwrite: replace a file at ``path``.
    """
    from repvgg.quantization import quantize
    from repvgg.studies.report.quantizability_page import QuantizabilityPage, channel_ranges

    with busy("Measuring each layer"):
        _, report = quantize(plain, images.calibration, settings)
    runtimes = _in_onnxruntime(plain, images, settings)
    page = QuantizabilityPage(
        name=network.metadata.model if network.metadata else network.source,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["repvgg", *sys.argv[1:]]),
        steps=steps,
        report=report,
        channels=channel_ranges(plain, report),
        calibration=len(images.calibration),
        images=steps.nearest.images,
        runtimes=runtimes,
        facts={**network.notes, "settings": str(report.settings)},
    )
    write_line(f"wrote {page.write(path, overwrite=overwrite)}")


def _in_onnxruntime(
    plain: nn.Module, images: QuantizationImages, settings: QuantizationSettings
) -> Mapping[str, Quality]:
    """Return the quality of each granularity, with and without bounded pairs; nothing without ONNX Runtime."""
    from repvgg.deploy.int8 import CHOICES, quantize_for_cpu
    from repvgg.quantization import Reference

    choices = [replace(one, pair_bound=bound) for bound in (True, False) for one in CHOICES]
    selection = Reference(plain, images.selection)
    try:
        with busy("Trying granularities in ONNX Runtime"):
            return quantize_for_cpu(plain, images.calibration, selection, settings, choices)[2]
    except MissingDependencyError:
        return {}
