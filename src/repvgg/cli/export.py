"""``repvgg export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg._files import check_output_folder
from repvgg._progress import busy
from repvgg.cli._network import (
    Network,
    check_output_file,
    data_config,
    folded_regions,
    load_network,
    plain_form,
    warn_of_random_weights,
)
from repvgg.cli._options import InputHeightWidth, JsonFlag, Number, OptionalFile
from repvgg.cli._output import equality, write_json, write_line, write_table
from repvgg.cli._page_options import PageOptions
from repvgg.errors import DataError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from repvgg.deploy.preprocessing import Preprocessing
    from repvgg.deploy.targets import Exported, ExportRequest

_ALL = "all"
_NO_PAGE_OPTIONS = PageOptions()
_BATCH = 8  # photographs that are compared at once
_DATA_IMAGES = 16  # of --data
_ROUNDS = 20
_CPU = Literal["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "native"]
_TARGET = Literal[
    "c",
    "onnx",
    "ort",
    "openvino",
    "pt2",
    "torchscript",
    "executorch",
    "ncnn",
    "coreml",
    "tensorrt",
    "litert",
    "web",
    "all",
]


def export(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    to: _TARGET,
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    weights: OptionalFile = None,
    num_classes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="CLASSES")] = None,
    input_size: InputHeightWidth = None,
    precision: Literal["float32", "float16"] = "float32",
    with_preprocessing: bool = False,
    images: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="", metavar="IMAGE")] = (),
    data: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="URI")] = None,
    target: Annotated[_CPU | None, tyro.conf.arg(help_behavior_hint="")] = None,
    max_batch: Number = None,
    threads: Number = None,
    packed_weights: Annotated[Literal["embedded", "file"] | None, tyro.conf.arg(help_behavior_hint="")] = None,
    name: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    rounds: int = _ROUNDS,
    overwrite: bool = False,
    as_json: JsonFlag = False,
    page: Annotated[PageOptions, tyro.conf.arg(name="")] = _NO_PAGE_OPTIONS,
) -> None:
    """Export any network in its plain form to another runtime, and keep what was written only if it is equal.

    SOURCE is as for 'repvgg convert': a checkpoint, hub:OWNER/NAME, timm:NAME, torchvision:NAME, repvgg:NAME, or
    PATH.py:FACTORY. A train form is converted first. A quantized ONNX file, from 'repvgg quantize', is a SOURCE of ort,
    openvino and tensorrt.

    Each file is run in its own runtime, on photographs and on images that reveal errors at borders, and compared with
    SOURCE in float64. Core ML and TensorRT do not run here: their files are converted, and the output says so. How
    pixels become inputs is in the metadata of the file, or in a JSON file next to it.

    --to c writes a folder with a C library, its header, an example and a README. The library needs no Python and no
    other library, and runs on every processor of --target. It is run in qemu for another architecture, or else not at
    all, which the output says.

    --to web writes a folder with a page that runs the network in a browser: drop an image, see the classes or the mask.

    --to all writes a folder with every format whose package is installed, and a table of size, error and latency. Its
    page fetches onnxruntime-web with npm, once.

        repvgg export plain.safetensors m.xml --to openvino --precision float16
        repvgg export timm:mobileone_s0 m.pte --to executorch --weights s0.pth
        repvgg export plain.safetensors model/ --to c --target x86-64-v3
        repvgg export plain.safetensors m.onnx --to onnx --data imagefolder:photos
        repvgg export int8.onnx int8.xml --to openvino
        repvgg export plain.safetensors page/ --to web --single-file
        repvgg export plain.safetensors everything/ --to all

    Args:
        source: where the model comes from.
        out: the file or the folder to write.
        to: the format; see docs/export.md.
        model: refuse a checkpoint of any other model, a name from 'repvgg list'.
        weights: trained weights of a model by name or factory, safetensors or a torch file with a state_dict.
        num_classes: logits of a model by name (default: the model's own).
        input_size: height and width of the images (default: the model's own). They are fixed in the export.
        precision: of weights and, where the runtime can, arithmetic. Inputs and outputs are float32.
        with_preprocessing: the file takes pixels in [0, 255], as float32 (N, C, H, W), and normalizes them itself.
        images: files, or folders of them, to compare on instead of the photographs of scikit-learn; prepared as SOURCE
            was trained, or for ImageNet where it does not say.
        data: labelled images, such as imagefolder:PATH, or images with masks, such as masks:PATH; 16 random images of
            the validation split are compared instead of the photographs of scikit-learn.
        target: of a C library: the processors (default: native, the widest of these that this machine runs).
        max_batch: of a C library: the largest number of images of a call (default: 1).
        threads: of a C library: the default number, also what is optimized for (default: that of PyTorch here).
        packed_weights: of a C library: inside of the library or in a file next to it (default: embedded).
        name: of a C library: its functions begin with it (default: model).
        rounds: of all targets: how often each file is timed.
        overwrite: replace what exists.
        as_json: of all targets: print the table as JSON.
        page: options of --to web.
    """
    from repvgg.deploy import images_for
    from repvgg.deploy.onnx_source import is_onnx_source
    from repvgg.deploy.preprocessing import preprocessing_of
    from repvgg.deploy.targets import ExportRequest
    from repvgg.deploy.targets import export as export_to

    given = {"target": target, "max_batch": max_batch, "threads": threads, "packed_weights": packed_weights}
    options = {key: value for key, value in {**given, "name": name, **page.given}.items() if value is not None}
    if input_size and min(input_size) < 1:
        raise UsageError("Height and width of an image are both at least 1.")
    _check(to, source, out, weights, options, precision, rounds, overwrite, as_json)
    if is_onnx_source(source):
        changed = [weights, num_classes, input_size, model, data, *images]
        if any(value is not None for value in changed) or with_preprocessing or precision != "float32":
            raise UsageError("An ONNX file is exported as it is: name only OUT and --to.")
        _export_onnx_file(to, source, out, overwrite)
        return
    if with_preprocessing and to in ("c", "web"):
        raise UsageError(f"--to {to} has no preprocessing in the graph: leave out --with-preprocessing.")
    if images and data is not None:
        raise UsageError("--images and --data are both images to compare on: give one of them.")
    with busy("Loading"):
        network = load_network(source, model, weights, num_classes, input_size, None)
        example = images_for(network.model, network.shape)[0]
        preprocessing = preprocessing_of(network.model, network.metadata, network.shape)
        real, remark = _photographs(images, data, network, preprocessing, pixels=with_preprocessing)
    warn_of_random_weights(network, weights)
    plain, folded = plain_form(network, example)
    made_plain = f"the network was made plain first: {folded_regions(folded)}"
    request = ExportRequest(
        network.model,
        plain,
        out,
        network.shape,
        real,
        overwrite,
        network.notes_in_file,
        options,
        preprocessing,
        with_preprocessing,
        precision,
    )
    if to == _ALL:
        _export_all(request, rounds, as_json)
        return
    with busy("Exporting"):
        exported = export_to(to, request)
    write_line(made_plain if folded.folded else "the network is plain: it was exported as it is")
    if remark:
        write_line(remark)
    _write_result(exported, sum(len(batch) for batch in real))


def _check(
    to: str,
    source: str,
    out: Path,
    weights: Path | None,
    options: dict[str, Any],
    precision: Literal["float32", "float16"],
    rounds: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Check what can be checked before the network is loaded."""
    from repvgg.deploy.all_targets import TABLE
    from repvgg.deploy.targets import check_files_beside, check_request, export_target

    if to == _ALL:
        if options:
            raise UsageError(f"--{next(iter(options)).replace('_', '-')} is not an option of --to all.")
        if rounds < 1:
            raise UsageError("--rounds is at least 1.")
        check_output_folder(out, TABLE, overwrite=overwrite)
        return
    if as_json or rounds != _ROUNDS:
        raise UsageError("--json and --rounds are options of --to all: leave them out.")
    check_request(to, out, options, precision)
    if export_target(to).is_folder:
        check_output_folder(out, export_target(to).replaceable, overwrite=overwrite)
    else:
        check_output_file(source, out, weights, overwrite=overwrite)
        check_files_beside(to, out, overwrite=overwrite)


def _export_onnx_file(to: str, source: str, out: Path, overwrite: bool) -> None:
    from repvgg.deploy.onnx_source import export_onnx_file

    if to == _ALL:
        raise UsageError("An ONNX file has few targets: export it --to ort, openvino or tensorrt.")
    with busy("Exporting"):
        exported = export_onnx_file(to, Path(source), out, overwrite=overwrite)
    _write_result(exported, 0)


def _export_all(request: ExportRequest, rounds: int, as_json: bool) -> None:
    from repvgg._progress import progress_bar
    from repvgg.deploy.all_targets import export_all
    from repvgg.deploy.targets import TARGETS

    done: list[str] = []
    with progress_bar("targets") as on_progress:

        def report(name: str) -> None:
            on_progress(len(done), len(TARGETS))
            done.append(name)

        table = export_all(request, rounds=rounds, on_target=report)
    if as_json:
        write_json(table)
        return
    write_table(table.cells(), numbers=False)
    write_line(f"wrote {request.out}: {sum(bool(row.file) for row in table.rows)} of {len(table.rows)} targets")


def _write_result(exported: Exported, photographs: int) -> None:
    others = f" and {photographs} photographs" if photographs and not exported.photographs else ""
    if exported.evidence:
        write_line(f"the export is {equality(exported.evidence)}, on border images{others}")
    if exported.photographs:
        write_line(f"the export is {equality(exported.photographs)}, on {photographs} photographs")
    if exported.evidence:
        write_line(f"tolerance: {exported.evidence.tolerance_origin}")
    if exported.inputs:
        inputs = ", ".join(f"{name} ({shape})" for name, shape in exported.inputs.items())
        write_line(f"inputs: {inputs}; outputs: {', '.join(exported.outputs)}")
    if exported.inventory:
        write_line(f"operators: {exported.inventory}")
    for remark in exported.remarks:
        write_line(remark)
    write_line(f"wrote {exported.path}: {exported.contents}")


def _photographs(
    paths: Sequence[Path], data: str | None, network: Network, preprocessing: Preprocessing, *, pixels: bool
) -> tuple[list[Tensor], str]:
    """Return photographs as the exported file takes them, in batches, and a sentence if there are none."""
    import torch

    from repvgg.data import DataConfig, list_images, read_usable_images
    from repvgg.deploy.comparison_images import photographs
    from repvgg.deploy.preprocessing import PIXEL_MAX
    from repvgg.quantization.images import open_evaluation_images

    channels, height, width = network.shape
    if not paths and data is None:
        try:
            found = photographs(network.shape)
        except MissingDependencyError as error:
            return [], str(error)
        found = found if pixels else preprocessing.apply(found)
        return list(torch.split(found, _BATCH)), ""
    if channels not in (1, 3):
        raise UsageError("--images and --data are for networks of images of 1 or 3 channels: leave them out.")
    mean, std = preprocessing.mean, preprocessing.std
    if pixels:
        mean, std = (0.0,) * channels, (1.0 / PIXEL_MAX,) * channels
    if data is not None:
        config = replace(data_config(network, data), mean=mean, std=std)
        chosen = [batch for batch, _ in open_evaluation_images(config, network.shape, _DATA_IMAGES)]
        return list(torch.split(torch.cat(chosen), _BATCH)), ""
    if height != width:
        raise UsageError("--images are for networks of square images: leave them out.")
    found, _, corrupt = read_usable_images(list_images(paths), DataConfig(mean=mean, std=std), height, channels)
    if corrupt:
        raise DataError(f"{corrupt[0].location!r} {corrupt[0].reason}: name images that can be read.")
    return list(torch.split(found, _BATCH)), ""
