"""The options of ``repvgg export --to web``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class PageOptions:
    """How the page is made.

    Attributes:
        onnxruntime_web: of a page: the folder node_modules/onnxruntime-web, or the file that 'npm pack onnxruntime-web'
            writes (default: fetched with npm, once).
        single_file: of a page: embed everything in index.html, which opens without a server.
        crop_fraction: of a page: the central crop as a fraction of the short side (default: 0.875).
        interpolation: of a page: of the resize (default: bilinear).
    """

    onnxruntime_web: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="PATH")] = None
    single_file: bool = False
    crop_fraction: Annotated[float | None, tyro.conf.arg(help_behavior_hint="")] = None
    interpolation: Annotated[Literal["bilinear", "bicubic"] | None, tyro.conf.arg(help_behavior_hint="")] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        values: dict[str, Any] = {"onnxruntime_web": self.onnxruntime_web, "single_file": self.single_file or None}
        values |= {"crop_fraction": self.crop_fraction, "interpolation": self.interpolation}
        return {name: value for name, value in values.items() if value is not None}
