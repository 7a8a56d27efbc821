"""Export to a page that runs the network in a browser: a folder with the ONNX file, the page and ONNX Runtime Web.

The page reads an image that its user chooses, prepares it as :func:`repvgg.data.read_images` does, byte by byte, and
shows the most probable classes or the mask. It makes no request to any other server. ``web_templates/`` has its files.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor, nn

from repvgg import __version__
from repvgg._files import atomic_folder
from repvgg.checkpoints import Metadata
from repvgg.data import DataConfig
from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD, Interpolation, per_channel
from repvgg.data.label_sets import MAX_CLASSES, voc_colours
from repvgg.deploy.onnxruntime_web import SCRIPT, WASM, WebRuntime, find_runtime
from repvgg.deploy.preprocessing import Preprocessing, notes_of
from repvgg.deploy.shipping import ship
from repvgg.deploy.targets import TARGETS, Exported, ExportRequest, Shape
from repvgg.errors import UsageError
from repvgg.verify import isolated_eval

PAGE, MODEL, ABOUT = "index.html", "model.onnx", "repvgg-page.json"
_TEMPLATES = Path(__file__).with_name("web_templates")
_SCRIPTS = ("worker.js", "preprocessing.mjs")  # what app.js reads beside model, runtime and description
_STYLE, _APP = "style.css", "app.js"

Kind: TypeAlias = Literal["classification", "segmentation"]


@final
@dataclass(frozen=True)
class PageDescription:
    """What the page has to know about its network: the content of ``repvgg-page.json``.

    Attributes:
        kind: logits (N, K), or (N, K, H, W) of the size of the image.
        name: of the network.
        weights: where they come from, in words; may be empty.
        input_shape: (C, H, W) of an image.
        num_classes: K.
        classes: a name for each class; empty if unknown.
        palette: a colour for each class of a segmentation network.
        mean: per channel, of pixels in [0, 1].
        std: per channel; see ``mean``.
        crop_fraction: of a classifier, see :class:`repvgg.data.DataConfig`.
        interpolation: of the resize.
    """

    kind: Kind
    name: str
    weights: str
    input_shape: Shape
    num_classes: int
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    interpolation: Interpolation

    def to_json(self, runtime: WebRuntime) -> str:
        """Return the text of ``repvgg-page.json``."""
        data = {
            "kind": self.kind,
            "name": self.name,
            "weights": self.weights,
            "inputShape": self.input_shape,
            "numClasses": self.num_classes,
            "classes": self.classes,
            "palette": self.palette,
            "mean": self.mean,
            "std": self.std,
            "cropFraction": self.crop_fraction,
            "interpolation": self.interpolation,
            "runtime": {"version": runtime.version, "script": SCRIPT, "wasm": WASM, "sha256": runtime.sha256()},
            "writtenBy": f"repvgg {__version__}",
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def export(request: ExportRequest) -> Exported:
    """Write the folder of a request; the target "web" of the table.

    Options: ``onnxruntime_web`` (see :func:`repvgg.deploy.onnxruntime_web.find_runtime`), ``single_file`` (embed
    everything in ``index.html``), ``crop_fraction`` and ``interpolation`` (see :class:`repvgg.data.DataConfig`).

    Raises:
        UsageError: the network is neither a classifier of square images nor a segmentation network, or the runtime is
            not where the option says.
        MissingDependencyError: the runtime cannot be fetched, because npm is not installed.
        ExportError: the network cannot be exported, or the runtime is damaged.
        EquivalenceError: the ONNX file computes a different function.
        OutputError: the folder cannot be written.
    """
    about = describe_page(
        request.plain, request.input_shape, request.notes, request.preprocessing, **_preprocessing(request.options)
    )
    runtime = find_runtime(request.options.get("onnxruntime_web"))
    with atomic_folder(request.out, TARGETS["web"].replaceable, overwrite=request.overwrite) as part:
        shipped = ship(
            request.reference,
            request.plain,
            part / MODEL,
            request.input_shape,
            notes=notes_of(request.notes, request.preprocessing),
            images=request.images,
        )
        (part / ABOUT).write_text(about.to_json(runtime), encoding="utf-8")
        (part / SCRIPT).write_bytes(runtime.script)
        (part / WASM).write_bytes(runtime.wasm)
        for name in (PAGE, _STYLE, _APP, *_SCRIPTS):
            (part / name).write_bytes((_TEMPLATES / name).read_bytes())
        size = sum(file.stat().st_size for file in part.iterdir())
        if request.options.get("single_file"):
            _embed(part)
            size = (part / PAGE).stat().st_size
    images = " x ".join(map(str, request.input_shape))
    contents = f"a page for {about.kind} of images of {images}, {size / 2**20:.1f} MiB"
    remarks = [f"Open {request.out / PAGE}." if request.options.get("single_file") else _serve(request.out)]
    if not runtime.is_known:
        remarks.append(f"The page was not tested with onnxruntime-web {runtime.version}: try it.")
    return Exported(request.out, contents, shipped.evidence, tuple(remarks))


def _serve(folder: Path) -> str:
    return f"To open the page: python -m http.server --directory {folder}, then http://localhost:8000."


def _preprocessing(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("crop_fraction", "interpolation") if name in options}


def describe_page(
    plain: nn.Module,
    input_shape: Shape,
    notes: Mapping[str, str],
    preprocessing: Preprocessing | None = None,
    *,
    crop_fraction: float = DataConfig.crop_fraction,
    interpolation: Interpolation = DataConfig.interpolation,
) -> PageDescription:
    """Describe a network by its output on an empty image and by the header of its checkpoint.

    Mean and standard deviation are those of ``preprocessing``; without it those of the header, or else ImageNet's.

    Args:
        plain: the network.
        input_shape: (C, H, W) of an image.
        notes: texts about the network by name, and the header.
        preprocessing: of the source, such as timm's; None if it does not say.
        crop_fraction: see :class:`PageDescription`.
        interpolation: see :class:`PageDescription`.

    Raises:
        UsageError: it is neither a classifier of square images nor a segmentation network, or an option is out of its
            range.
    """
    config = DataConfig(crop_fraction=crop_fraction, interpolation=interpolation)  # checks both
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise UsageError(f"A page shows images of 1 or 3 channels, and the network takes {channels}.")
    kind, num_classes = _output_of(plain, input_shape)
    if kind == "classification" and height != width:
        raise UsageError(
            f"A page for a classifier takes square images, got {height} x {width}: add --input-size {height} {height}."
        )
    if kind == "segmentation" and num_classes > MAX_CLASSES:
        raise UsageError(f"A page shows masks of at most {MAX_CLASSES} classes, and the network has {num_classes}.")
    metadata = Metadata.from_header(dict(notes), "the source")
    known = metadata or Metadata(notes.get("source", "network"), "plain", num_classes, channels, height)
    classes = known.classes or (preprocessing.classes if preprocessing else ())
    mean, std = known.mean or IMAGENET_MEAN, known.std or IMAGENET_STD
    if preprocessing is not None:
        mean, std = preprocessing.mean, preprocessing.std
    colours = tuple((int(red), int(green), int(blue)) for red, green, blue in voc_colours(num_classes))
    return PageDescription(
        kind=kind,
        name=known.model,
        weights=notes.get("weights", ""),
        input_shape=input_shape,
        num_classes=num_classes,
        classes=classes if len(classes) == num_classes else (),
        palette=(known.palette or colours) if kind == "segmentation" else (),
        mean=per_channel("mean", mean, channels),
        std=per_channel("std", std, channels),
        crop_fraction=config.crop_fraction,
        interpolation=config.interpolation,
    )


def _output_of(plain: nn.Module, input_shape: Shape) -> tuple[Kind, int]:
    weight = next((one for one in plain.parameters() if one.is_floating_point()), torch.zeros(()))
    with isolated_eval(plain):
        logits = plain(torch.zeros(1, *input_shape, dtype=weight.dtype, device=weight.device))
    kinds: tuple[Kind, ...] = get_args(Kind)
    if isinstance(logits, Tensor):
        for kind, shape in zip(kinds, ((), input_shape[1:]), strict=True):
            if logits.ndim == 2 + len(shape) and tuple(logits.shape[2:]) == shape and logits.shape[1] > 1:
                return kind, logits.shape[1]
    what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise UsageError(f"A page shows classes (1, K) or masks (1, K, H, W), and the network returns {what}.")


def _embed(folder: Path) -> None:
    """Move the other files of a page into its HTML; ``repvgg-page.json`` stays beside it, to be read."""
    page = (folder / PAGE).read_text(encoding="utf-8")
    style, app = ((folder / name).read_text(encoding="utf-8") for name in (_STYLE, _APP))
    assets = (ABOUT, MODEL, SCRIPT, WASM, *_SCRIPTS)
    texts = {name: base64.b64encode((folder / name).read_bytes()).decode() for name in assets}
    data = "\n".join(f'<script type="text/plain" data-asset="{name}">{text}</script>' for name, text in texts.items())
    # The page may run these two inline texts and no other.
    policy = {
        "style-src 'self'": f"style-src '{_csp_hash(style)}'",
        "script-src 'self'": f"script-src '{_csp_hash(app)}'",
    }
    for before, after in {**policy, "connect-src 'self'; ": ""}.items():
        page = _replaced(page, before, after)
    page = _replaced(page, f'<link rel="stylesheet" href="{_STYLE}">', f"<style>{style}</style>")
    # At the end: a module waits for the whole page, and the data are part of it.
    page = _replaced(page, f'<script type="module" src="{_APP}"></script>\n', "")
    page = _replaced(page, "</body>", f'{data}\n<script type="module">{app}</script>\n</body>')
    (folder / PAGE).write_text(page, encoding="utf-8")
    for name in (MODEL, SCRIPT, WASM, _STYLE, _APP, *_SCRIPTS):
        (folder / name).unlink()


def _replaced(page: str, before: str, after: str) -> str:
    assert page.count(before) == 1, before
    return page.replace(before, after)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
