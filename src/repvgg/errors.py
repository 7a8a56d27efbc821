"""The exceptions and warnings of repvgg, and helpers that word their messages.

Every error that repvgg raises on purpose is a :class:`RepvggError`; its text is one sentence that says what is wrong
and what to do next. Catch by meaning::

    RepvggError
    ├── ReparamError
    │   ├── TrainingModeError, MissingStatisticsError, NotLinearError, BorderError
    │   └── EquivalenceError
    ├── UnknownModelError, SourceError, CheckpointError
    ├── OutputError
    │   └── OutputExistsError
    ├── DataError, TrainingError, ExportError, UnsupportedError, UsageError
    ├── RefusedPropertyError (a UsageError, also an AttributeError)
    └── MissingDependencyError (also an ImportError)

Warnings: NothingFoldedWarning, NothingExpandedWarning, CacheWarning, FallbackWarning, FreshWeightsWarning,
OtherBlockWarning.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class RepvggError(Exception):
    """Base class of all errors that repvgg raises on purpose."""


class ReparamError(RepvggError):
    """A model or a block cannot be converted into a plain one."""


class TrainingModeError(ReparamError):
    """A batch norm normalizes with the statistics of the batch, so it is not a fixed linear map."""


class MissingStatisticsError(ReparamError):
    """A batch norm has no running statistics to fold."""


class NotLinearError(ReparamError):
    """A function between input and output is not a linear, shift-invariant map."""


class BorderError(ReparamError):
    """The merged convolution would differ from its parts at the border of the image."""


class EquivalenceError(ReparamError):
    """The output of the result differs from that of its source."""


class UnknownModelError(RepvggError):
    """No model of that name."""


class SourceError(RepvggError):
    """A model source (``timm:NAME``, ``FILE.py:FACTORY``, a path) cannot be used."""


class CheckpointError(RepvggError):
    """A file cannot be read as a checkpoint, or does not fit the model."""


class OutputError(RepvggError):
    """A file cannot be written."""


class OutputExistsError(OutputError):
    """The file exists and overwriting was not requested."""


class DataError(RepvggError):
    """A data set is missing, empty or malformed."""


class TrainingError(RepvggError):
    """A training run cannot continue."""


class ExportError(RepvggError):
    """A model could not be exported, or the exported file is wrong."""


class UnsupportedError(RepvggError):
    """The engine does not support a layer of the network."""


class UsageError(RepvggError):
    """An argument is invalid."""


class RefusedPropertyError(UsageError, AttributeError):
    """A plain model is asked for a property that reads parts which are merged; ``hasattr`` is false."""


class MissingDependencyError(RepvggError, ImportError):
    """An optional package is not installed."""


class NothingFoldedWarning(UserWarning):
    """A conversion was requested and there was nothing to convert."""


class NothingExpandedWarning(UserWarning):
    """Branches or batch norms were requested, and no convolution got any."""


class FreshWeightsWarning(UserWarning):
    """Some weights are newly initialized: the model has other classes, channels or blocks than its source."""


class OtherBlockWarning(UserWarning):
    """Some layers use another block than the one requested, which does not support their geometry."""


class CacheWarning(UserWarning):
    """Machine code cannot be cached on disk: each process compiles again."""


class FallbackWarning(UserWarning):
    """The engine runs on PyTorch or on a single thread instead of as requested."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of a message without its full stop, or the type of an error that has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# Joiners between letters: emoji and several scripts need them, and they move nothing.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    r"""Return ``text`` with escapes such as ``\x1b`` in place of all that a terminal does not show as a character.

    Text from files may hold escape sequences, which change colours, titles and what was printed before, or marks
    that reverse the direction of the text after them.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return ``text`` as :func:`printable` does, but keep its line feeds and tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def typed_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, for errors raised by a user's code."""
    name = type(error).__name__
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{name}: {text.strip().splitlines()[0]}" if text.strip() else name


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # the last by cuDNN and cuBLAS


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on the CPU or on an accelerator."""
    # PyTorch has an exception class for accelerators (OutOfMemoryError) and none for the CPU: only the text is common.
    text = str(error)
    return isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def close_names(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """Return the known names closest to ``name``, the closest first; none if all are far from it."""
    return difflib.get_close_matches(name.lower(), list(known), n=most)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, most: int = 3) -> str:
    """Return "did you mean A or B?" with the known names closest to ``name``, or ``otherwise`` if none is close."""
    close = close_names(name, known, most=most)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def require(package: str, extra: str | None = None) -> ModuleType:
    """Import an optional package.

    Args:
        package: the module to import, perhaps one inside the package.
        extra: the extra of repvgg that installs it, or None if the default installation includes it.

    Raises:
        MissingDependencyError: the package is not installed; the text names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        wanted, name = f"repvgg[{extra}]" if extra else "repvgg", package.partition(".")[0]
        raise MissingDependencyError(f"This needs {name!r}, which is not installed: pip install '{wanted}'.") from error
