"""Models from outside: timm, torchvision, and Python files of the user. Nothing here downloads: weights are random."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

from repvgg.errors import SourceError, UnknownModelError, did_you_mean, first_line, require, typed_line

Shape = tuple[int, int, int]  # (C, H, W)
DEFAULT_SHAPE: Shape = (3, 224, 224)

# Prefix of the module names of imported files: a file called torch.py must not replace torch in sys.modules.
_MODULE_PREFIX = "repvgg_source_"


class Built(NamedTuple):
    """A newly built model and the shape (C, H, W) of the images it is designed for."""

    model: nn.Module
    input_shape: Shape


def build_timm(name: str, num_classes: int | None, in_channels: int | None) -> Built:
    """Build a model of timm by name.

    Raises:
        MissingDependencyError: timm is not installed.
        UnknownModelError: timm has no such model.
        SourceError: timm rejects the name's tag or an argument.
    """
    timm = require("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    arguments = {"num_classes": num_classes, "in_chans": in_channels}
    given = {key: value for key, value in arguments.items() if value is not None}
    model = _build(f"timm:{name}", timm.create_model, name, pretrained=False, **given)
    config = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(config.get("input_size") or DEFAULT_SHAPE)
    return Built(model, shape if len(shape) == 3 else DEFAULT_SHAPE)


def build_torchvision(name: str, num_classes: int | None = None, in_channels: int | None = None) -> Built:
    """Build a model of torchvision by name; it has no parameter for ``in_channels``, which is ignored.

    Raises:
        MissingDependencyError: torchvision is not installed.
        UnknownModelError: torchvision has no such model.
        SourceError: torchvision rejects an argument.
    """
    models = require("torchvision", "train").models
    if name not in (known := models.list_models()):
        raise _unknown("torchvision", name, known)
    given: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        given["weights_backbone"] = None  # the default of detection and segmentation models is a download
    return Built(_build(f"torchvision:{name}", models.get_model, name, weights=None, **given), DEFAULT_SHAPE)


def _build(what: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    try:
        model = make(*args, **kwargs)
    except Exception as error:  # these libraries reject arguments with exceptions of any type
        raise SourceError(f"{what} cannot be built: {first_line(error)}.") from error
    assert isinstance(model, nn.Module)
    return model


def _unknown(library: str, name: str, known: list[str]) -> UnknownModelError:
    otherwise = f"its models are listed by {library}'s list_models()."
    return UnknownModelError(
        f"{library} has no model {name!r}: {did_you_mean(name.partition('.')[0], known, otherwise)}"
    )


def model_from_file(path: str | os.PathLike[str], factory: str) -> nn.Module:
    """Import a Python file, which runs it, and call its ``factory`` without arguments.

    During the import and the call the file's folder is first on ``sys.path``, so that the file can import its
    neighbours, and no bytecode is written. If ``factory`` names an ``nn.Module``, that module itself is returned.

    Raises:
        SourceError: there is no such file or name, the import or the call fails, or the result is not an
            ``nn.Module``. The text names file and line of a failure in the user's own code.
    """
    file = Path(path)
    try:
        is_file = file.is_file()
    except OSError as error:  # a name that is too long, for example
        raise SourceError(f"{str(file)!r} cannot be read: {error.strerror or error}.") from error
    if not is_file:
        what = "a folder" if file.is_dir() else "no file"
        raise SourceError(f"There is {what} at {str(file)!r}: give the path of a Python file.")
    with _importable(file.resolve().parent):
        with _errors_located(file, f"{str(file)!r} cannot be imported"):
            module = _import(file)
        make = _find_factory(module, factory, file)
        if isinstance(make, nn.Module):
            return make
        with _errors_located(file, f"{factory}() of {str(file)!r} failed"):
            model = make()
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{factory}() of {str(file)!r} returned a value of type {type(model).__name__}, not an nn.Module."
        )
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put the folder first on ``sys.path``, and write no ``__pycache__`` to it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        if str(folder) in sys.path:  # the user's code may have changed sys.path
            sys.path.remove(str(folder))


@contextmanager
def _errors_located(file: Path, what: str) -> Iterator[None]:
    """Turn whatever the user's code raises into one sentence with file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # not KeyboardInterrupt: Ctrl-C stays Ctrl-C
        place = _place(error, file.resolve().parent)
        raise SourceError(f"{what}{f', at {place}' if place else ''}: {typed_line(error)}") from error


def _import(file: Path) -> ModuleType:
    name = f"{_MODULE_PREFIX}{file.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(file.resolve()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _find_factory(module: ModuleType, factory: str, file: Path) -> Callable[[], Any]:
    make = getattr(module, factory, None)
    if make is None:
        # Suggest what the file defines, not what it imports.
        defined = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        available = f"it defines {', '.join(defined[:3])}." if defined else "it defines no function and no class."
        raise SourceError(f"{str(file)!r} has no {factory!r} in it: {did_you_mean(factory, defined, available)}")
    if not callable(make):
        raise SourceError(f"{factory!r} in {str(file)!r} is of type {type(make).__name__}, not a function or a class.")
    return make  # type: ignore[no-any-return]


def _place(error: BaseException, folder: Path) -> str:
    """Return the innermost line of the user's own code in the traceback as FILE:LINE, or an empty string."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_users(Path(frame.filename), folder)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def _is_users(file: Path, folder: Path) -> bool:
    # A virtual environment inside the folder holds packages that are not the user's code.
    return file.is_relative_to(folder) and "site-packages" not in file.relative_to(folder).parts
