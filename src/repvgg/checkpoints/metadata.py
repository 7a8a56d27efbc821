"""The header of a checkpoint: what is needed to rebuild the model and to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from repvgg.errors import CheckpointError

KEY = "repvgg"
_LARGEST_COUNT = 2**31  # exclusive; sizes beyond it are errors or attacks, not models
Form = Literal["train", "plain"]


@dataclass(frozen=True)
class Metadata:
    """The header of a checkpoint.

    Attributes:
        model: name of the architecture.
        form: ``train`` (branches) or ``plain`` (one convolution a block).
        num_classes: number of logits.
        in_channels: channels of the input images.
        input_size: height and width in pixels of the training images.
        mean: per channel, of pixels in [0, 1]; the model takes ``(pixel - mean) / std``.
        std: per channel; see ``mean``.
        classes: names of the classes, in the order of the logits.
        recipe: the training config, as plain data.
        metrics: what the model reached, by name.
        version: of the library that wrote the file.
        ema: whether the weights are a moving average of the training weights.
        source: where the weights were taken from, if they were not trained where the file was written.
        spec: the whole architecture as plain data, if ``model`` is not a built-in one; see
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
        """Return the header as safetensors stores it: strings only, the fields as one JSON document."""
        # "format" is what safetensors' loaders of other libraries (transformers) ask for.
        return {"format": "pt", KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_header(cls, header: dict[str, str] | None, path: str) -> Metadata | None:
        """Parse a header; None if it has no entry of this library. Fields of later versions are ignored.

        Raises:
            CheckpointError: the entry cannot be parsed, or a field is invalid.
        """
        if not header or KEY not in header:
            return None
        # Not repvgg._serde: an unreadable header and an invalid field need different advice than a config file.
        try:
            data = json.loads(header[KEY])
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            for name in ("mean", "std", "classes"):
                known[name] = tuple(known.get(name, ()))
            metadata = cls(**known)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path!r} has a header that cannot be read ({error}): save it again.") from error
        if invalid := metadata.invalid_field():
            raise CheckpointError(f"{path!r} has a header with an invalid {invalid!r}: save it again.")
        return metadata

    def invalid_field(self) -> str | None:
        """Return the name of the first field with an invalid value, or None."""
        return next((name for name, valid in self._validity() if not valid), None)

    def _validity(self) -> Iterator[tuple[str, bool]]:
        for name in ("num_classes", "in_channels", "input_size"):
            # type() rather than isinstance: True is an int. The limit keeps a forged header from allocating memory.
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
