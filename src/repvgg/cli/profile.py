"""``repvgg profile``."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

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
class Asked:
    """What is profiled, and on which images."""

    model: str
    input_size: tuple[int, int]
    channels: int
    batch: int
    dtype: str

    @property
    def size(self) -> str:
        """Channels, height and width."""
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
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Say what a model holds, computes and moves, in the form that it is trained in and in the plain form.

    MODEL is a row of 'repvgg list', a baseline such as resnet50 or mobileone_s0, timm:NAME, torchvision:NAME,
    PATH.py:FACTORY, or a checkpoint. Nothing is computed where that can be helped: large images take no memory.

    A multiply-add counts once; those of convolutions and matrix products are the paper's FLOPs. Bytes: each op reads
    its inputs and weights once and writes its outputs once; views move nothing. The activation peak is what an eager
    run holds at its highest, images included, weights apart. An op that no rule knows is listed, and the sums that it
    belongs to are marked as lower bounds.

        repvgg profile repvgg_b3 --input-size 713 713 --per stage
        repvgg profile timm:mobileone_s0 --form plain --per layer --json
        repvgg profile --paper table4

    Args:
        model: what to profile.
        input_size: height and width of the images; without it what the model is made for.
        batch: images in one forward; all counts are for the whole batch.
        form: as it is trained, plain (branches merged, batch norms folded), or both beside each other.
        winograd: outputs of a tile in each direction: 4/9 of the multiplications of a stride-1 3x3 convolution for 2,
            a quarter for 4, whatever the size of the image.
        per: layers or stages in rows, too, or the total alone.
        dtype: of weights and images; without it that of the model.
        paper: instead of one model, all of Table 4 or 5 beside what the paper printed, each difference explained.
        as_json: print JSON, with exact numbers.
    """
    from repvgg.cli.profile_table import write_profiles
    from repvgg.cli.terminal import busy, write_json

    settings = (model, input_size, batch, form, winograd, per, dtype)
    if paper is not None:
        _write_paper(paper, as_json, alone=settings == _DEFAULTS)
        return
    _check(batch, input_size)
    with busy("Counting"):
        asked, profiles = _profiles(model, input_size, batch, form, winograd, dtype)
    if as_json:
        write_json(_as_data(asked, profiles, per))
    else:
        write_profiles(str(asked), profiles, per)


def _check(batch: int, input_size: tuple[int, int] | None) -> None:
    from repvgg.errors import UsageError

    if min(batch, *(input_size or (1, 1))) < 1:
        raise UsageError("Batch, height and width are all at least 1.")


def _write_paper(table: Literal["table4", "table5"], as_json: bool, alone: bool) -> None:
    from repvgg.cli.profile_table import write_counts
    from repvgg.cli.terminal import busy, write_json
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
) -> tuple[Asked, dict[str, Profile]]:
    """A profile a form: on the meta device, or with values where a forward looks at them."""
    from repvgg.errors import UsageError
    from repvgg.models import named_model

    sourced = named_model(name, values=False)
    asked = _asked(sourced, input_size, batch, dtype)
    try:
        return asked, _by_form(sourced, asked, form, tile)
    except UsageError:
        return asked, _by_form(named_model(name), asked, form, tile)


def _asked(sourced: ResolvedModel, input_size: tuple[int, int] | None, batch: int, dtype: Dtype | None) -> Asked:
    channels, *size = sourced.input_shape
    own = next((p.dtype for p in sourced.model.parameters() if p.is_floating_point()), "float32")
    height, width = input_size or size
    return Asked(sourced.source, (height, width), channels, batch, dtype or str(own).removeprefix("torch."))


def _by_form(sourced: ResolvedModel, asked: Asked, form: Form, tile: int) -> dict[str, Profile]:
    """A profile for "train", "plain" or both, as far as the model has them."""
    import torch

    from repvgg import measure

    dtype = getattr(torch, asked.dtype)
    device = next((p.device for p in sourced.model.parameters()), torch.device("meta"))
    images = torch.zeros(asked.batch, asked.channels, *asked.input_size, dtype=dtype, device=device)
    with _complaining(asked):
        forms = _forms(sourced.model.to(dtype), images, asked, form)
        return {name: measure.profile(model, images, tile=tile) for name, model in forms.items()}


@contextmanager
def _complaining(asked: Asked) -> Iterator[None]:
    """Whatever a stranger's forward raises, in one sentence."""
    from repvgg.errors import RepvggError, UsageError, first_line

    try:
        yield
    except (RepvggError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{asked.model} cannot run on images of {asked.size}: {first_line(error)}.") from error


def _forms(model: nn.Module, images: Tensor, asked: Asked, form: Form) -> dict[str, nn.Module]:
    """The forms that were asked for."""
    from repvgg.errors import CheckpointError
    from repvgg.models import RepVGG, form_of
    from repvgg.studies.candidates import plain_form

    if isinstance(model, RepVGG) and form_of(model) == "plain":
        if form == "train":
            raise CheckpointError(f"{asked.model!r} is in the plain form, whose branches are gone: profile that one.")
        return {"plain": model}
    if form == "train":
        return {"train": model}
    plain = plain_form(model, images)
    return {"plain": plain} if form == "plain" else {"train": model, "plain": plain}


def _as_data(asked: Asked, profiles: Mapping[str, Profile], per: Per) -> dict[str, Any]:
    """Everything as JSON knows it."""
    forms = {
        name: {
            "total": done.total.to_dict(),
            "weight_bytes": done.weight_bytes,
            **({f"{per}s": [row.to_dict() for row in done.rows(per)]} if per != "total" else {}),
        }
        for name, done in profiles.items()
    }
    tile = next(iter(profiles.values())).tile
    return {**asdict(asked), "winograd": f"F({tile}x{tile}, 3x3)", "forms": forms}
