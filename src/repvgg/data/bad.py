"""The images that could not be used so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from repvgg.data.decoding import Bad


@final
class BadImages:
    """What was skipped, every image once however often it was met, in the order in which it was found.

    Loading processes tell with every batch what they skipped, so that it is counted here as the batch is handed over.
    """

    def __init__(self) -> None:
        self._found: dict[str, Bad] = {}

    @property
    def count(self) -> int:
        """Number of different images."""
        return len(self._found)

    def first(self, number: int) -> list[tuple[str, str]]:
        """Where the first ``number`` of them lie, each with what is wrong."""
        return [(bad.where, bad.why) for bad in list(self._found.values())[:number]]

    def add(self, found: Iterable[Bad]) -> None:
        """Take note of some more."""
        for bad in found:
            self._found.setdefault(bad.where, bad)
