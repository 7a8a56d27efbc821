"""Data sets as one kind of value, :class:`ImageSplit`, and what may be done to their images.

The transforms are loaded on first use: importing torchvision takes longer than all the rest.
"""

from typing import TYPE_CHECKING, Any

from repvgg.data.augment import AffineJitter
from repvgg.data.digits import digits
from repvgg.data.images import ImagesInMemory, ImageSplit, LabelledImages

if TYPE_CHECKING:
    from repvgg.data.transforms import JitterEach

__all__ = ["AffineJitter", "ImageSplit", "ImagesInMemory", "JitterEach", "LabelledImages", "digits"]


def __getattr__(name: str) -> Any:
    if name == "JitterEach":
        from repvgg.data.transforms import JitterEach

        return JitterEach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
