"""``repvgg profile``: what a model costs, in total, by stage or by layer, and the counts of the paper's tables."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from string import ascii_lowercase
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg._progress import busy
from repvgg.cli._options import BatchSize, InputHeightWidth, JsonFlag
from repvgg.cli._output import write_json, write_line, write_table
from repvgg.errors import CheckpointError, RepvggError, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from repvgg.measure import Profile, Row
    from repvgg.models import ResolvedModel
    from repvgg.studies.counts import CountRow, Difference

Dtype = Literal["float32", "bfloat16", "float16"]
Form = Literal["train", "plain", "both"]
Per = Literal["layer", "stage", "total"]
_MODEL = "repvgg_a0"
_DEFAULTS = (_MODEL, None, 1, "both", 2, "total", None)


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile, and on which images."""

    model: str
    input_size: tuple[int, int]
    channels: int
    batch: int
    dtype: str

    @property
    def size(self) -> str:
        return " x ".join(map(str, (self.channels, *self.input_size)))

    def __str__(self) -> str:
        return f"{self.model}: batch {self.batch}, images of {self.size}, {self.dtype}"


def profile(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = _MODEL,
    input_size: InputHeightWidth = None,
    batch: BatchSize = 1,
    form: Form = "both",
    winograd: Literal[2, 4] = 2,
    per: Per = "total",
    dtype: Annotated[Dtype | None, tyro.conf.arg(help_behavior_hint="")] = None,
    paper: Annotated[Literal["table4", "table5"] | None, tyro.conf.arg(help_behavior_hint="")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Count the parameters, operations and memory traffic of a model, in the train form and in the plain form.

    MODEL is a name from 'repvgg list', a baseline such as resnet50 or mobileone_s0, timm:NAME, torchvision:NAME,
    PATH.py:FACTORY, or a checkpoint. Models run on the meta device where possible, so large images need no memory.

    A multiply-add counts once; those of convolutions and matrix products are the paper's FLOPs. Bytes: each op reads
    its inputs and weights once and writes its outputs once; views move nothing. The activation peak is the largest
    memory of activations in an eager run, images included and weights excluded. Unknown ops are listed, and the sums
    that they belong to are marked as lower bounds.

        repvgg profile repvgg_b3 --input-size 713 713 --per stage
        repvgg profile timm:mobileone_s0 --form plain --per layer --json
        repvgg profile --paper table4

    Args:
        model: what to profile.
        input_size: height and width of the images (default: the model's own).
        batch: images per forward; all counts are for the whole batch.
        form: train, plain (branches merged, batch norms folded), or both side by side.
        winograd: the m of F(m x m, 3x3), outputs of a tile per axis: 4/9 of the multiplications of a stride-1 3x3
            convolution for 2, 1/4 for 4, whatever the size of the image.
        per: list layers or stages as well as the total, or the total alone.
        dtype: of weights and images (default: the model's own).
        paper: instead of one model, all of Table 4 or 5 next to the printed numbers, with each difference explained.
        as_json: print JSON, with exact numbers.
    """
    if paper is not None:
        if (model, input_size, batch, form, winograd, per, dtype) != _DEFAULTS:
            raise UsageError("--paper counts the models of a table as the paper does: give it alone, or with --json.")
        _write_paper(paper, as_json)
        return
    if min(batch, *(input_size or (1, 1))) < 1:
        raise UsageError("Batch, height and width are all at least 1.")
    with busy("Counting"):
        request, profiles = _profiles(model, input_size, batch, form, winograd, dtype)
    if as_json:
        write_json(_as_data(request, profiles, per))
    else:
        _write_profiles(str(request), profiles, per)


def _profiles(
    name: str, input_size: tuple[int, int] | None, batch: int, form: Form, tile: int, dtype: Dtype | None
) -> tuple[ProfileRequest, dict[str, Profile]]:
    from repvgg.models import named_model

    resolved = named_model(name, values=False)
    channels, *size = resolved.input_shape
    own = next((p.dtype for p in resolved.model.parameters() if p.is_floating_point()), "float32")
    height, width = input_size or size
    dtype_name = dtype or str(own).removeprefix("torch.")
    request = ProfileRequest(resolved.source, (height, width), channels, batch, dtype_name)
    try:
        return request, _by_form(resolved, request, form, tile)
    except UsageError:  # a forward that reads values cannot run on the meta device
        return request, _by_form(named_model(name), request, form, tile)


def _by_form(resolved: ResolvedModel, request: ProfileRequest, form: Form, tile: int) -> dict[str, Profile]:
    import torch

    from repvgg import measure

    dtype = getattr(torch, request.dtype)
    device = next((p.device for p in resolved.model.parameters()), torch.device("meta"))
    images = torch.zeros(request.batch, request.channels, *request.input_size, dtype=dtype, device=device)
    with _one_sentence_errors(request):
        forms = _forms(resolved.model.to(dtype), images, request, form)
        return {name: measure.profile(model, images, tile=tile) for name, model in forms.items()}


@contextmanager
def _one_sentence_errors(request: ProfileRequest) -> Iterator[None]:
    """Turn any exception of a foreign forward into one sentence."""
    try:
        yield
    except (RepvggError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{request.model} cannot run on images of {request.size}: {first_line(error)}.") from error


def _forms(model: nn.Module, images: Tensor, request: ProfileRequest, form: Form) -> dict[str, nn.Module]:
    from repvgg.models import RepVGG, form_of
    from repvgg.studies.candidates import plain_form

    if isinstance(model, RepVGG) and form_of(model) == "plain":
        if form == "train":
            raise CheckpointError(f"{request.model!r} is in the plain form: profile it with --form plain.")
        return {"plain": model}
    if form == "train":
        return {"train": model}
    plain = plain_form(model, images)
    return {"plain": plain} if form == "plain" else {"train": model, "plain": plain}


def _as_data(request: ProfileRequest, profiles: Mapping[str, Profile], per: Per) -> dict[str, Any]:
    forms = {
        name: {
            "total": done.total.to_dict(),
            "weight_bytes": done.weight_bytes,
            **({f"{per}s": [row.to_dict() for row in done.rows(per)]} if per != "total" else {}),
        }
        for name, done in profiles.items()
    }
    tile = next(iter(profiles.values())).tile
    return {**asdict(request), "winograd": f"F({tile}x{tile}, 3x3)", "forms": forms}


_TITLES = ("params", "multiply-adds", "Wino MULs", "bytes moved", "MACs/byte", "activation peak")
_SCALES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_SIGNIFICANT_DIGITS = 4


def _write_profiles(title: str, profiles: Mapping[str, Profile], per: Per) -> None:
    """Write a table of layers or stages for each form, and the totals of all forms side by side."""
    if per != "total":
        for form, done in profiles.items():
            write_line(f"{title}, {form} form, by {per}")
            write_table([(per, *_TITLES), *((row.name or "(root)", *_cells(row)) for row in done.rows(per))])
            write_line()
    write_line(title)
    tile = next(iter(profiles.values())).tile
    names = (
        "parameters",
        "multiply-adds (the paper's FLOPs)",
        f"Winograd multiplications, F({tile}x{tile}, 3x3)",
        "bytes moved",
        "multiply-adds per byte",
        "activation peak",
    )
    rows = [("", *(f"{form} form" for form in profiles))]
    rows += zip(names, *(_cells(done.total) for done in profiles.values()), strict=True)
    weights = ("memory of the weights", *(f"{_si(done.weight_bytes)}B" for done in profiles.values()))
    write_table([*rows[:-1], weights, rows[-1]])
    for line in dict.fromkeys(line for done in profiles.values() for line in _not_counted(done.total)):
        write_line(line)


def _cells(row: Row) -> tuple[str, ...]:
    """Return the values under ``_TITLES``; those that unknown ops make lower bounds are marked."""
    arithmetic = ">= " if row.unknown else ""
    traffic = ">= " if row.unknown_traffic else ""
    return (
        _si(row.params),
        arithmetic + _si(row.macs),
        arithmetic + _si(row.winograd_muls),
        f"{traffic}{_si(row.bytes_moved)}B",
        "" if row.intensity is None else f"{row.intensity:.2f}",
        f"{_si(row.peak_bytes)}B" if row.ops else "not run",
    )


def _si(value: int) -> str:
    """Return a number with four significant digits and an SI prefix, 8.309 M; below 1000 as an integer."""
    for scale, prefix in _SCALES:
        if value >= scale:
            digits = max(0, _SIGNIFICANT_DIGITS - len(str(value // scale)))
            return f"{value / scale:.{digits}f} {prefix}"
    return f"{value} "


def _not_counted(row: Row) -> Iterator[str]:
    for what, names in (("multiply-adds", row.unknown), ("bytes", row.unknown_traffic)):
        if names:
            yield f"{what} of these ops are unknown and not in the sums: {', '.join(names)}"


_COUNT_TITLES = ("model", "params M, train", "plain", "paper", "GFLOPs", "paper", "Wino GMULs", "paper", "")


def _write_paper(table: Literal["table4", "table5"], as_json: bool) -> None:
    """Write our counts next to the paper's, and below them the reason for each difference."""
    from repvgg.models import BASELINES
    from repvgg.studies.counts import count_rows

    with busy("Counting"):
        rows = count_rows(table)
    if as_json:
        write_json([row.to_dict() for row in rows])
        return
    recounts: dict[str, list[str]] = {}
    for row in rows:
        for difference in row.differences:
            recounts.setdefault(_reason(difference), []).append(_recount(row, difference))
    marks = dict(zip(recounts, ascii_lowercase, strict=False))
    write_table([_COUNT_TITLES, *(_count_cells(row, marks) for row in rows)])
    write_line()
    for reason, found in recounts.items():
        write_line(f"{marks[reason]}: {reason}: {', '.join(found)}.")
    notes: dict[str, list[str]] = {}  # on how baselines are built
    for row in rows:
        if row.model in BASELINES and (note := BASELINES[row.model].note):
            notes.setdefault(note, []).append(row.title)
    for note, titles in notes.items():
        write_line(f"{', '.join(titles)}: {note}.")


def _count_cells(row: CountRow, marks: Mapping[str, str]) -> tuple[str, ...]:
    from repvgg.studies.counts import PRINTED_AS, printed_text, rounded

    cells = []
    for column in PRINTED_AS:
        cells += [rounded(column, row.count(column)), printed_text(column, row.paper) or "-"]
    differences = " ".join(marks[_reason(difference)] for difference in row.differences)
    return (row.title, f"{row.params_train / 1e6:.2f}", *cells, differences)


def _reason(difference: Difference) -> str:
    return difference.reason if difference.explained else "not explained"


def _recount(row: CountRow, difference: Difference) -> str:
    """Return the model with its count under the paper's counting rule."""
    from repvgg.studies.counts import PRINTED_AS

    unit, digits = PRINTED_AS[difference.column]
    count = row.count(difference.column) if difference.recounted is None else difference.recounted
    return f"{row.title} {count / unit:.{digits + 1}f}"
