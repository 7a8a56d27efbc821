"""What the verbs that write a plain form share: the proof, and how it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repvgg.models import LoadedModel, RepVGG
    from repvgg.verify import Evidence


def proven(train: LoadedModel, plain: RepVGG) -> Evidence:
    """That both forms are equal, on images that make borders count, at the checkpoint's size and at two odd ones.

    Raises:
        EquivalenceError: they are not.
    """
    from repvgg.cli.terminal import busy
    from repvgg.verify import border_inputs, verify

    about = train.metadata
    images = border_inputs((2, about.in_channels, about.input_size, about.input_size), batches=3)
    with busy("Verifying"):
        return verify(train.model, plain, images).raise_if_failed()


def in_words(evidence: Evidence) -> str:
    """The verdict in a line."""
    return f"equal: relative error {evidence.relative:.1e} in {evidence.dtype}, {evidence.tolerance:.1e} allowed"
