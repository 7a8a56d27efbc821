"""What a checkpoint says about itself: enough to rebuild the model, and to use it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from repvgg.errors import CheckpointError

KEY = "repvgg"
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
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path!r} has a header that cannot be read ({error}): save it again.") from error
        metadata.check(path)
        return metadata

    def check(self, path: str) -> None:
        """Check that the numbers make sense.

        Raises:
            CheckpointError: they do not.
        """
        counts = (self.num_classes, self.in_channels, self.input_size)
        sane = all(isinstance(count, int) and count > 0 for count in counts) and isinstance(self.model, str)
        if not sane or self.form not in ("train", "plain"):
            raise CheckpointError(f"{path!r} has a header that makes no sense: save it again.")
