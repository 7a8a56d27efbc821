"""A model out of a Python file of the user's own. Unlike a checkpoint, such a file is code, and it is run."""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from repvgg.errors import SourceError, typed_line

_MODULE_PREFIX = "repvgg_source_"  # keeps a file called torch.py from standing in for torch


def model_from_file(path: str | os.PathLike[str], factory: str) -> nn.Module:
    """Import the file at ``path`` and call its ``factory`` without arguments.

    The file's folder is the first on ``sys.path`` meanwhile, so that it can import its neighbours. No bytecode is
    written beside it. An ``nn.Module`` that stands in the file under that name is taken as it is.

    Raises:
        SourceError: no such file, no such name in it, the import or the call fails, or no ``nn.Module`` comes back;
            what fails in the user's own files is named with file and line.
    """
    file = Path(path)
    _check_file(file)
    with _importable(file.resolve().parent):
        with _named(file, f"{str(file)!r} cannot be imported"):
            module = _imported(file)
        make = _found(module, factory, file)
        if isinstance(make, nn.Module):
            return make
        with _named(file, f"{factory}() of {str(file)!r} failed"):
            model = make()
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{factory}() of {str(file)!r} returned a value of type {type(model).__name__}, not an nn.Module."
        )
    return model


def _check_file(file: Path) -> None:
    try:
        there = file.is_file()
    except OSError as error:
        raise SourceError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error
    if not there:
        what = "a folder" if file.is_dir() else "no file"
        raise SourceError(f"There is {what} at {str(file)!r}: give the path of a Python file.")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The folder first on ``sys.path``, and no ``__pycache__`` written to it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


@contextmanager
def _named(file: Path, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one sentence with file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        place = _place(error, file.resolve().parent)
        raise SourceError(f"{what}{f', at {place}' if place else ''}: {typed_line(error)}") from error


def _imported(file: Path) -> ModuleType:
    name = f"{_MODULE_PREFIX}{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file.resolve()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for what is defined in it
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _found(module: ModuleType, factory: str, file: Path) -> Callable[[], Any]:
    here = {name: value for name, value in vars(module).items() if not name.startswith("_") and _is_own(value, module)}
    make = getattr(module, factory, None)
    if make is None:
        close = difflib.get_close_matches(factory, here, n=3) or list(here)[:3]
        there = f"; there is {', '.join(close)}" if close else ""
        raise SourceError(f"{str(file)!r} has no {factory!r} in it{there}.")
    if not callable(make):
        raise SourceError(f"{factory!r} in {str(file)!r} is of type {type(make).__name__}, not a function or a class.")
    return make  # type: ignore[no-any-return]


def _is_own(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _place(error: BaseException, folder: Path) -> str:
    """The last line of the user's own code on the way to the error, as FILE:LINE; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _within(Path(frame.filename), folder)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def _within(file: Path, folder: Path) -> bool:
    """Whether a file is the user's: below the folder, and not of a package installed there."""
    return file.is_relative_to(folder) and "site-packages" not in file.relative_to(folder).parts
