"""URIs of data sets: ``scheme:rest?option=value&flag``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from repvgg.errors import UsageError

SCHEMES = ("imagefolder", "torchvision", "hf", "webdataset", "digits", "fake")


@final
@dataclass(frozen=True)
class DataUri:
    """A URI in its parts.

    Attributes:
        text: the whole.
        scheme: one of ``SCHEMES``.
        rest: what follows the colon, without options.
        options: what follows a question mark; a flag without a value has the value "".
    """

    text: str
    scheme: str
    rest: str
    options: dict[str, str] = field(default_factory=dict)

    def check_options(self, *allowed: str) -> None:
        """Complain about an option that the source does not have.

        Raises:
            UsageError: there is one.
        """
        for name in self.options:
            if name not in allowed:
                known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
                raise UsageError(f"{self.text!r} has an unknown option {name!r}: {known}.")

    def number(self, name: str) -> int | None:
        """The value of an option that is a number from 1 on, or None where it is not given.

        Raises:
            UsageError: it is something else.
        """
        if name not in self.options:
            return None
        value = self.options[name]
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"Option {name!r} of {self.text!r} is a number from 1 on, not {value!r}.")
        return int(value)


def parse_uri(text: str) -> DataUri:
    """Take a URI apart.

    Raises:
        UsageError: no scheme, or one that is not known.
    """
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES:
        known = ", ".join(f"{name}:" for name in SCHEMES)
        raise UsageError(f"{text!r} is no data set: a URI starts with one of {known}, as in imagefolder:PATH.")
    if scheme == "imagefolder":  # a path may hold any sign
        return DataUri(text, scheme, rest)
    before, mark, query = rest.rpartition("?")
    if not mark or not _is_query(query):
        return DataUri(text, scheme, rest)
    pairs = (part.partition("=") for part in query.split("&") if part)
    return DataUri(text, scheme, before, {name: value for name, _, value in pairs})


def _is_query(text: str) -> bool:
    """A question mark may also be a wildcard in a file name."""
    names = [part.partition("=")[0] for part in text.split("&")]
    return all(name.isidentifier() for name in names)
