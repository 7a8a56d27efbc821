"""The exceptions of repvgg, and the one way to ask for an optional package.

Every error that repvgg raises on purpose is a :class:`RepvggError`; its text is one sentence that says what is wrong
and what to do next. Catch by meaning::

    RepvggError
    ├── ReparamError                 a model or a block cannot be turned into a plain one
    │   ├── TrainingModeError        a batch norm still normalizes with the statistics of the batch
    │   ├── MissingStatisticsError   a batch norm has no running statistics to fold
    │   ├── NotLinearError           a function on the way is not a linear, shift-invariant map
    │   ├── BorderError              the two sides would differ at the border of the image
    │   └── EquivalenceError         the outcome was run and is not equal to what it came from
    ├── UnknownModelError            no model of that name
    ├── SourceError                  a model cannot be built from where it is said to come from
    ├── CheckpointError              a file cannot be read as a checkpoint, or does not fit the model
    ├── OutputError                  a file cannot be written
    │   └── OutputExistsError        something is in the way and nobody asked to overwrite it
    ├── DataError                    a data set is missing, empty or malformed
    ├── TrainingError              a run cannot go on
    ├── ExportError                  a model could not be exported, or the exported file is not what it should be
    ├── UnsupportedError             the engine does not know a layer of the network
    ├── UsageError                   an argument makes no sense
    └── MissingDependencyError       an optional package is not installed (also an ImportError)

    NothingFoldedWarning             a conversion was asked for and there was nothing to convert
    NothingExpandedWarning           branches or batch norms were asked for, and no convolution got any
    CacheWarning                     machine code cannot be kept on the disk, and is made anew in each process
    FallbackWarning                  something simpler and slower does the work that the engine was asked to do
    FreshWeightsWarning              some weights of a model begin afresh, and are not those that it came with
    OtherBlockWarning                some layers of a network are of another block than the one that was asked for
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType


class RepvggError(Exception):
    """Whatever repvgg raises on purpose."""


class ReparamError(RepvggError):
    """A model or a block cannot be turned into a plain one."""


class TrainingModeError(ReparamError):
    """A batch norm still normalizes with the statistics of the batch: it is no fixed linear map."""


class MissingStatisticsError(ReparamError):
    """A batch norm keeps no running statistics: there is nothing to fold."""


class NotLinearError(ReparamError):
    """A function on the way is not a linear, shift-invariant map of the input."""


class BorderError(ReparamError):
    """The merged convolution would differ from its parts at the border of the image."""


class EquivalenceError(ReparamError):
    """The outcome was run and is not equal to what it came from."""


class UnknownModelError(RepvggError):
    """No model of that name."""


class SourceError(RepvggError):
    """A model cannot be built from where it is said to come from."""


class CheckpointError(RepvggError):
    """A file cannot be read as a checkpoint, or does not fit the model."""


class OutputError(RepvggError):
    """A file cannot be written."""


class OutputExistsError(OutputError):
    """Something is in the way and nobody asked to overwrite it."""


class DataError(RepvggError):
    """A data set is missing, empty or malformed."""


class TrainingError(RepvggError):
    """A run cannot go on."""


class ExportError(RepvggError):
    """A model could not be exported, or the exported file is not what it should be."""


class UnsupportedError(RepvggError):
    """The engine does not know a layer of the network."""


class UsageError(RepvggError):
    """An argument makes no sense."""


class MissingDependencyError(RepvggError, ImportError):
    """An optional package is not installed."""


class NothingFoldedWarning(UserWarning):
    """A conversion was asked for and there was nothing to convert."""


class NothingExpandedWarning(UserWarning):
    """Branches or batch norms were asked for, and no convolution got any."""


class FreshWeightsWarning(UserWarning):
    """Some weights of a model begin afresh: it is made for other classes or channels, or of other blocks."""


class OtherBlockWarning(UserWarning):
    """Some layers of a network are of another block than asked for, which has no form in their geometry."""


class CacheWarning(UserWarning):
    """Machine code cannot be kept on the disk: each process compiles anew."""


class FallbackWarning(UserWarning):
    """Something simpler and slower does the work that the engine was asked to do: PyTorch, or a single thread."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of somebody else says, without its full stop; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def typed_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says, if anything: for a stranger's code."""
    name = type(error).__name__
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{name}: {text.strip().splitlines()[0]}" if text.strip() else name


_NO_MEMORY = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # the last by cuDNN and cuBLAS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the CPU or of an accelerator.

    PyTorch has a class of its own for an accelerator without memory, and none for the CPU.
    """
    text = str(error)
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to say behind "there is no such name": the known names that are closest, or ``otherwise``."""
    import difflib

    close = difflib.get_close_matches(name.lower(), list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def require(package: str, extra: str | None = None) -> ModuleType:
    """Import an optional ``package``, or say how to get it.

    Args:
        package: name of the module to import.
        extra: the extra of repvgg that brings it, or None where the default install should hold it.

    Raises:
        MissingDependencyError: the package is not installed; the text names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        wanted = f"repvgg[{extra}]" if extra else "repvgg"
        raise MissingDependencyError(
            f"This needs {package!r}, which is not installed: pip install '{wanted}'."
        ) from error
