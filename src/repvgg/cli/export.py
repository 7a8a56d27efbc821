"""``repvgg export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from repvgg._files import check_output_folder
from repvgg._progress import busy
from repvgg.cli._network import (
    Network,
    check_output_file,
    folded_regions,
    load_network,
    plain_form,
    warn_of_random_weights,
)
from repvgg.cli._options import InputHeightWidth, Number, OptionalFile
from repvgg.cli._output import equality, write_line
from repvgg.cli._page_options import PageOptions
from repvgg.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_NO_PAGE_OPTIONS = PageOptions()
_BATCH = 8  # real images that are compared at once
_CPU = Literal["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "native"]


def export(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    to: Literal["c", "onnx", "pt2", "web"],
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    weights: OptionalFile = None,
    num_classes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="CLASSES")] = None,
    input_size: InputHeightWidth = None,
    images: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="", metavar="IMAGE")] = (),
    target: Annotated[_CPU | None, tyro.conf.arg(help_behavior_hint="")] = None,
    max_batch: Number = None,
    threads: Number = None,
    packed_weights: Annotated[Literal["embedded", "file"] | None, tyro.conf.arg(help_behavior_hint="")] = None,
    name: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    overwrite: bool = False,
    page: Annotated[PageOptions, tyro.conf.arg(name="")] = _NO_PAGE_OPTIONS,
) -> None:
    """Export any network in its plain form to another runtime, and keep what was written only if it is equal.

    SOURCE is as for 'repvgg convert': a checkpoint, hub:OWNER/NAME, timm:NAME, torchvision:NAME, repvgg:NAME, or
    PATH.py:FACTORY. A train form is converted first.

    --to c writes a folder with a C library, its header, an example and a README. The library needs no Python and no
    other library, and runs on every processor of --target. It is run and compared with SOURCE in float64: here, in
    qemu for another architecture, or else not at all, which the output says.

    --to web writes a folder with a page that runs the network in a browser: drop an image, see the classes or the mask.

        repvgg export plain.safetensors model/ --to c --target x86-64-v3
        repvgg export net.py:make_model net/ --to c --target aarch64 --max-batch 8
        repvgg export plain.safetensors plain.onnx --to onnx --images photographs/
        repvgg export plain.safetensors page/ --to web --single-file

    Args:
        source: where the model comes from.
        out: the file or the folder to write.
        to: the format: a C library in a folder, ONNX, a program of torch.export, or a page for browsers in a folder.
        model: refuse a checkpoint of any other model, a name from 'repvgg list'.
        weights: trained weights of a model by name or factory, safetensors or a torch file with a state_dict.
        num_classes: logits of a model by name (default: the model's own).
        input_size: height and width of the images (default: the model's own). They are fixed in the export.
        images: files, or folders of them, to compare on beside random images that reveal errors at borders; prepared
            as SOURCE was trained, or for ImageNet where it does not say.
        target: of a C library: the processors (default: native, the widest of these that this machine runs).
        max_batch: of a C library: the largest number of images of a call (default: 1).
        threads: of a C library: the default number, also what is optimized for (default: that of PyTorch here).
        packed_weights: of a C library: inside of the library or in a file next to it (default: embedded).
        name: of a C library: its functions begin with it (default: model).
        overwrite: replace what exists.
        page: see there.
    """
    from repvgg.deploy import images_for
    from repvgg.deploy.targets import ExportRequest, check_request, export_target
    from repvgg.deploy.targets import export as export_to

    given = {"target": target, "max_batch": max_batch, "threads": threads, "packed_weights": packed_weights}
    options = {key: value for key, value in {**given, "name": name, **page.given}.items() if value is not None}
    check_request(to, out, options)
    if export_target(to).suffix:
        check_output_file(source, out, weights, overwrite=overwrite)
    else:
        check_output_folder(out, export_target(to).replaceable, overwrite=overwrite)
    if input_size and min(input_size) < 1:
        raise UsageError("Height and width of an image are both at least 1.")
    with busy("Loading"):
        network = load_network(source, model, weights, num_classes, input_size, None)
        example = images_for(network.model, network.shape)[0]
        real = _read_images(images, network) if images else []
    warn_of_random_weights(network, weights)
    plain, folded = plain_form(network, example)
    with busy("Exporting"):
        request = ExportRequest(
            network.model, plain, out, network.shape, real, overwrite, network.notes_in_file, options
        )
        exported = export_to(to, request)
    made_plain = f"the network was made plain first: {folded_regions(folded)}"
    write_line(made_plain if folded.folded else "the network is plain: it was exported as it is")
    if exported.evidence:
        count = sum(len(batch) for batch in real)
        others = f" and {count} others" if count else ""
        write_line(f"the export is {equality(exported.evidence)}, on border images{others}")
        write_line(f"tolerance: {exported.evidence.tolerance_origin}")
    for remark in exported.remarks:
        write_line(remark)
    write_line(f"wrote {exported.path}: {exported.contents}")


def _read_images(paths: Sequence[Path], network: Network) -> list[Tensor]:
    """Read images as the network takes them; each is a batch."""
    import torch

    from repvgg.data import DataConfig, list_images, read_usable_images

    channels, height, width = network.shape
    if height != width or channels not in (1, 3):
        raise UsageError("--images are for networks of square images of 1 or 3 channels: leave them out.")
    about = network.metadata
    config = about.data_config() if about else DataConfig()
    found, _, corrupt = read_usable_images(list_images(paths), config, height, channels)
    if corrupt:
        raise DataError(f"{corrupt[0].location!r} {corrupt[0].reason}: name images that can be read.")
    return list(torch.split(found, _BATCH))
