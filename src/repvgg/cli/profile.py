"""``repvgg profile``."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg.cli._help import JsonFlag

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from repvgg.measure import Profile
    from repvgg.models import ResolvedModel

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
    input_size: Annotated[tuple[int, int] | None, tyro.conf.arg(help_behavior_hint="", metavar="H W")] = None,
    batch: Annotated[int, tyro.conf.arg(metavar="IMAGES")] = 1,
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
        paper: instead of one model, all of Table 4 or 5 beside the printed numbers, with each difference explained.
        as_json: print JSON, with exact numbers.
    """
    from repvgg.cli._output import busy, write_json
    from repvgg.cli.profile_table import write_profiles

    settings = (model, input_size, batch, form, winograd, per, dtype)
    if paper is not None:
        _write_paper(paper, as_json, alone=settings == _DEFAULTS)
        return
    _check(batch, input_size)
    with busy("Counting"):
        request, profiles = _profiles(model, input_size, batch, form, winograd, dtype)
    if as_json:
        write_json(_as_data(request, profiles, per))
    else:
        write_profiles(str(request), profiles, per)


def _check(batch: int, input_size: tuple[int, int] | None) -> None:
    from repvgg.errors import UsageError

    if min(batch, *(input_size or (1, 1))) < 1:
        raise UsageError("Batch, height and width are all at least 1.")


def _write_paper(table: Literal["table4", "table5"], as_json: bool, alone: bool) -> None:
    from repvgg.cli._output import busy, write_json
    from repvgg.cli.profile_table import write_counts
    from repvgg.errors import UsageError
    from repvgg.studies.counts import count_rows

    if not alone:
        raise UsageError("--paper counts the models of a table as the paper does: give it alone, or with --json.")
    with busy("Counting"):
        rows = count_rows(table)
    if as_json:
        write_json([row.to_dict() for row in rows])
    else:
        write_counts(rows)


def _profiles(
    name: str, input_size: tuple[int, int] | None, batch: int, form: Form, tile: int, dtype: Dtype | None
) -> tuple[ProfileRequest, dict[str, Profile]]:
    from repvgg.errors import UsageError
    from repvgg.models import named_model

    sourced = named_model(name, values=False)
    request = _request(sourced, input_size, batch, dtype)
    try:
        return request, _by_form(sourced, request, form, tile)
    except UsageError:  # a forward that reads values cannot run on the meta device
        return request, _by_form(named_model(name), request, form, tile)


def _request(
    sourced: ResolvedModel, input_size: tuple[int, int] | None, batch: int, dtype: Dtype | None
) -> ProfileRequest:
    channels, *size = sourced.input_shape
    own = next((p.dtype for p in sourced.model.parameters() if p.is_floating_point()), "float32")
    height, width = input_size or size
    return ProfileRequest(sourced.source, (height, width), channels, batch, dtype or str(own).removeprefix("torch."))


def _by_form(sourced: ResolvedModel, request: ProfileRequest, form: Form, tile: int) -> dict[str, Profile]:
    import torch

    from repvgg import measure

    dtype = getattr(torch, request.dtype)
    device = next((p.device for p in sourced.model.parameters()), torch.device("meta"))
    images = torch.zeros(request.batch, request.channels, *request.input_size, dtype=dtype, device=device)
    with _one_sentence_errors(request):
        forms = _forms(sourced.model.to(dtype), images, request, form)
        return {name: measure.profile(model, images, tile=tile) for name, model in forms.items()}


@contextmanager
def _one_sentence_errors(request: ProfileRequest) -> Iterator[None]:
    """Turn any exception of a foreign forward into one sentence."""
    from repvgg.errors import RepvggError, UsageError, first_line

    try:
        yield
    except (RepvggError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{request.model} cannot run on images of {request.size}: {first_line(error)}.") from error


def _forms(model: nn.Module, images: Tensor, request: ProfileRequest, form: Form) -> dict[str, nn.Module]:
    from repvgg.errors import CheckpointError
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
