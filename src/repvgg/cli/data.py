"""``repvgg data check``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import tyro

from repvgg._progress import progress_bar
from repvgg.cli._interrupt import interrupt_message
from repvgg.cli._options import JsonFlag
from repvgg.cli._output import INTERRUPTED, write_json, write_line, write_table

if TYPE_CHECKING:
    from repvgg.data import CheckReport, CorruptImage, MaskReport

_MAX_PATHS = 20  # of each kind of problem; --json lists all


def check(
    uri: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URI")],
    val: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="URI")] = None,
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0,
    limit: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="N")] = None,
    ignore_index: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="LABEL")] = None,
    allow_commands: bool = False,
    as_json: JsonFlag = False,
) -> int:
    """Read every image of a data set and report problems; exit code 1 if there are any.

    Counts classes, sizes and color modes, lists images that cannot be decoded, and finds images that are in both the
    training and the validation split. URIs: imagefolder:PATH, torchvision:NAME:PATH, hf:NAME, webdataset:PATTERN,
    digits:, fake:. Ctrl-C stops early and reports what was read.

    Images with masks (masks:PATH, cityscapes:PATH, ade20k:PATH, voc:PATH): also finds images without masks, masks
    without images, sizes that differ and labels out of range, and counts the pixels of each class.

        repvgg data check imagefolder:photos --workers 4
        repvgg data check torchvision:CIFAR10:data --json
        repvgg data check masks:street --ignore-index 11

    Args:
        uri: the data set.
        val: the validation split, where the URI holds one split only.
        workers: processes that read images (0: the main process).
        limit: images to read from each split (default: all).
        ignore_index: label of unlabelled pixels in masks (default: 255).
        allow_commands: run the shell command of webdataset:pipe:COMMAND.
        as_json: print JSON, with every path.
    """
    from repvgg.data import CheckReport, DataConfig, check_data, check_masks, is_mask_uri

    config = DataConfig(uri=uri, val=val, workers=workers, allow_commands=allow_commands, ignore_index=ignore_index)
    report: CheckReport | MaskReport
    with interrupt_message(None), progress_bar("images") as on_progress:
        if is_mask_uri(uri):
            report = check_masks(config, limit=limit, on_progress=on_progress)
        else:
            report = check_data(config, limit=limit, on_progress=on_progress)
    if as_json:
        write_json(report.to_dict())
    elif isinstance(report, CheckReport):
        _print(report)
    else:
        _print_masks(report)
    if not report.usable:
        return 1
    return 0 if report.complete else INTERRUPTED


def _print(report: CheckReport) -> None:
    _print_splits(report)
    for note in report.notes:
        write_line(f"note: {note}")
    if report.mismatch is not None:
        write_line(f"bad: {report.mismatch}")
    _print_corrupt(report.corrupt)
    for remark, places in report.remarks.items():
        _print_list(remark, places)
    _print_list("in both splits", [f"{ours} = {theirs}" for ours, theirs in report.duplicates])
    _print_list("the same image in two classes", [f"{one} = {other}" for one, other in report.conflicts])
    read = sum(split.images for split in report.splits)
    if not report.complete:
        write_line(f"interrupted after {read} of {report.total or 'unknown'} images")
    write_line(f"{read} images read, {len(report.corrupt)} bad")


def _print_masks(report: MaskReport) -> None:
    header = [f"{split.name} {what}" for split in report.splits for what in ("images", "pixels")]
    rows = []
    for label, name in (*enumerate(report.classes), (255, "ignored")):
        shares = [(split.present[label], split.pixels[label] / max(1, split.pixels.sum())) for split in report.splits]
        rows.append((name, *(text for images, share in shares for text in (f"{images}", f"{share:.2%}"))))
    write_table([("class", *header), *rows])
    for split in report.splits:
        sizes = ", ".join(f"{count} of {width} x {height}" for (width, height), count in split.sizes.most_common(3))
        more = f" and {len(split.sizes) - 3} other sizes" if len(split.sizes) > 3 else ""
        write_line(f"{split.name}: {split.images} images: {sizes or 'none readable'}{more} pixels")
        if split.images and (names := report.never_seen(split)):
            write_line(f"{split.name}: never seen: {', '.join(names)}")
    for note in report.notes:
        write_line(f"note: {note}")
    _print_corrupt(report.corrupt)
    _print_list("bad, image without mask", report.unmasked)
    _print_list("mask without image", report.unused)
    _print_list("in both splits", [f"{ours} = {theirs}" for ours, theirs in report.duplicates])
    read = sum(split.images for split in report.splits)
    if not report.complete:
        write_line(f"interrupted after {read} of {report.total} images")
    write_line(f"{read} images read, {len(report.corrupt) + len(report.unmasked)} bad")


def _print_corrupt(corrupt: list[CorruptImage]) -> None:
    for kind in Counter(bad.kind for bad in corrupt):
        _print_list(f"bad, {kind}", [f"{bad.location}: {bad.reason}" for bad in corrupt if bad.kind == kind])


def _print_splits(report: CheckReport) -> None:
    train, val = report.splits
    names = sorted({*train.classes, *val.classes}, key=_in_order)
    rows = [(name, f"{train.classes[name]}", f"{val.classes[name]}") for name in names]
    write_table([("class", train.name, val.name), *rows, ("all", f"{train.images}", f"{val.images}")])
    for split in report.splits:
        spread = split.size_range()
        if spread:
            smallest, median, largest = (f"{width} x {height}" for width, height in spread)
            modes = ", ".join(f"{count} {mode}" for mode, count in split.modes.most_common())
            write_line(f"{split.name}: smallest {smallest}, median {median}, largest {largest} pixels; {modes}")


def _in_order(name: str) -> tuple[int, str]:
    # Numbers in numeric order: "10" after "9".
    return (int(name), "") if name.isdecimal() else (-1, name)


def _print_list(what: str, places: list[str]) -> None:
    if not places:
        return
    write_line(f"{what}: {len(places)}")
    for place in places[:_MAX_PATHS]:
        write_line(f"  {place}")
    if len(places) > _MAX_PATHS:
        write_line(f"  and {len(places) - _MAX_PATHS} more")
