"""The header of a checkpoint: what is needed to rebuild the model and to use it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from repvgg.data.config import DataConfig
from repvgg.errors import CheckpointError, first_line

KEY = "repvgg"
# Exclusive; what is beyond them is an error or an attack, not a model.
_LARGEST_COUNT = 2**31
_LARGEST_INPUT = 2**14  # pixels
_LARGEST_STATISTIC = 1e6  # of pixels in [0, 1]
_MAX_NESTING = 50
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
        palette: a colour (red, green, blue, each 0 … 255) per class, of a segmentation network; empty if unknown.
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
    palette: tuple[tuple[int, int, int], ...] = ()

    def data_config(self, **settings: Any) -> DataConfig:
        """Return the config of images as the network takes them: its channels, and its mean and std if it has some.

        Args:
            **settings: further fields of the config.
        """
        channels: Literal[1, 3] = 1 if self.in_channels == 1 else 3
        return DataConfig(**{"channels": channels, "mean": self.mean or None, "std": self.std or None, **settings})

    def to_header(self) -> dict[str, str]:
        """Return the header as safetensors stores it: strings only, the fields as one JSON document."""
        # "format" is what safetensors' loaders of other libraries (transformers) ask for.
        data = asdict(self)
        if not self.palette:
            del data["palette"]  # headers of classifiers are as they were
        return {"format": "pt", KEY: json.dumps(data, sort_keys=True)}

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
            if _nesting(known) > _MAX_NESTING:
                raise ValueError("it is nested too deeply")
            for name in ("mean", "std", "classes"):
                known[name] = tuple(known.get(name, ()))
            known["palette"] = tuple(tuple(colour) for colour in known.get("palette", ()))
            metadata = cls(**known)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{path!r} has a header that cannot be read ({reason}): save it again.") from error
        if invalid := metadata.invalid_field():
            raise CheckpointError(f"{path!r} has a header with an invalid {invalid!r}: save it again.")
        return metadata

    def invalid_field(self) -> str | None:
        """Return the name of the first field with an invalid value, or None."""
        return next((name for name, valid in self._validity() if not valid), None)

    def _validity(self) -> Iterator[tuple[str, bool]]:
        limits = {"num_classes": _LARGEST_COUNT, "in_channels": _LARGEST_COUNT, "input_size": _LARGEST_INPUT}
        for name, limit in limits.items():
            # type() rather than isinstance: True is an int. The limit keeps a forged header from allocating memory.
            yield name, type(getattr(self, name)) is int and 0 < getattr(self, name) < limit
        yield "model", isinstance(self.model, str)
        yield "form", self.form in ("train", "plain")
        for name in ("mean", "std"):
            values = getattr(self, name)
            valid = all(_is_number(value) and abs(value) < _LARGEST_STATISTIC for value in values)
            yield (
                name,
                valid and len(values) in (0, self.in_channels) and (name == "mean" or all(v > 0 for v in values)),
            )
        yield "classes", all(isinstance(c, str) for c in self.classes) and len(self.classes) in (0, self.num_classes)
        yield "recipe", isinstance(self.recipe, dict)
        yield "metrics", isinstance(self.metrics, dict) and all(map(_is_number, self.metrics.values()))
        yield "version", isinstance(self.version, str)
        yield "ema", isinstance(self.ema, bool)
        yield "source", isinstance(self.source, str)
        yield "spec", self.spec is None or isinstance(self.spec, dict)
        yield (
            "palette",
            len(self.palette) in (0, self.num_classes)
            and all(len(rgb) == 3 and all(type(v) is int and 0 <= v <= 255 for v in rgb) for rgb in self.palette),
        )


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number in the range of a float."""
    # Comparisons, because math.isfinite raises for integers beyond that range; NaN compares false.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def _nesting(value: object) -> int:
    """Return how deeply lists and dictionaries are nested."""
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
    return depth


def _children(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
