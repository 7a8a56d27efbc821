"""What a checkpoint says about itself: enough to rebuild the model, and to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from repvgg.errors import CheckpointError

KEY = "repvgg"
_LARGEST_COUNT = 2**31
Form = Literal["train", "plain"]


@dataclass(frozen=True)
class Metadata:
    """The header of a checkpoint.

    Attributes:
        model: name of the row in the table of models.
        form: ``train`` (branches) or ``plain`` (one convolution a block).
        num_classes: number of logits.
        in_channels: channels of the input images.
        input_size: height and width in pixels that it was trained at.
        mean: of the pixels in [0, 1], one number a channel; the model takes ``(pixel - mean) / std``.
        std: likewise.
        classes: names of the classes, in the order of the logits.
        recipe: how it was trained, as plain data.
        metrics: what it reached, by name.
        version: of the library that wrote it.
        ema: whether the weights are an average over training steps.
        source: where the weights were taken from, if they were not trained where the file was written.
        spec: the whole model as plain data, where ``model`` is no row of the table; see
            :func:`repvgg.models.spec_to_data`.
    """

    model: str
    form: Form
    num_classes: int
    in_channels: int
    input_size: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    version: str = ""
    ema: bool = False
    source: str = ""
    spec: dict[str, Any] | None = None

    def to_header(self) -> dict[str, str]:
        """The header as safetensors stores it."""
        return {"format": "pt", KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_header(cls, header: dict[str, str] | None, path: str) -> Metadata | None:
        """Read a header; None if it holds nothing of ours.

        Raises:
            CheckpointError: it is ours and cannot be understood.
        """
        if not header or KEY not in header:
            return None
        try:
            data = json.loads(header[KEY])
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            for name in ("mean", "std", "classes"):
                known[name] = tuple(known.get(name, ()))
            metadata = cls(**known)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path!r} has a header that cannot be read ({error}): save it again.") from error
        if wrong := metadata.senseless():
            raise CheckpointError(f"{path!r} has a header whose {wrong!r} makes no sense: save it again.")
        return metadata

    def senseless(self) -> str | None:
        """The first field that makes no sense, or None."""
        return next((name for name, sane in self._sanity() if not sane), None)

    def _sanity(self) -> Iterator[tuple[str, bool]]:
        for name in ("num_classes", "in_channels", "input_size"):
            yield name, type(getattr(self, name)) is int and 0 < getattr(self, name) < _LARGEST_COUNT
        yield "model", isinstance(self.model, str)
        yield "form", self.form in ("train", "plain")
        for name in ("mean", "std"):
            values = getattr(self, name)
            yield name, all(map(_is_number, values)) and len(values) in (0, self.in_channels)
        yield "classes", all(isinstance(c, str) for c in self.classes) and len(self.classes) in (0, self.num_classes)
        yield "recipe", isinstance(self.recipe, dict)
        yield "metrics", isinstance(self.metrics, dict) and all(map(_is_number, self.metrics.values()))
        yield "version", isinstance(self.version, str)
        yield "ema", isinstance(self.ema, bool)
        yield "source", isinstance(self.source, str)
        yield "spec", self.spec is None or isinstance(self.spec, dict)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
