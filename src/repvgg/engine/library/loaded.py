"""``repvgg.engine.load``: an exported library as a callable, without compiling anything."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from repvgg.engine.codegen.jit import MachineCode, host_isa
from repvgg.engine.graph import Floats, Shape
from repvgg.engine.library.description import MAX_RANK
from repvgg.engine.library.object_file import read_archive
from repvgg.engine.runtime.memory import InputView, view_inputs
from repvgg.engine.runtime.thread_pool import check_threads
from repvgg.errors import UsageError

OK, BUSY = 0, 4  # of model_status

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # the result, and the parameters
    "create": (_INT, ctypes.c_char_p, _INT, ctypes.POINTER(_POINTER)),
    "run_strided": (_INT, _POINTER, _LONG, _POINTER, _POINTER, _POINTER),
    "destroy": (None, _POINTER),
    "threads": (_INT, _POINTER),
    "last_error": (ctypes.c_char_p, _POINTER),
    "version": (ctypes.c_char_p,),
    "max_images": (_LONG,),
    "num_inputs": (_INT,),
    "num_outputs": (_INT,),
    "input_shape": (_INT, _INT, ctypes.POINTER(_LONG)),
    "output_shape": (_INT, _INT, ctypes.POINTER(_LONG)),
}


def load(
    path: str | os.PathLike[str], threads: int | None = None, *, weights: str | os.PathLike[str] | None = None
) -> CompiledLibrary:
    """Load a network that was exported as a C library (``repvgg export … --to c``). Nothing is compiled.

    A library is machine code: load only files that you trust.

    Args:
        path: ``libNAME.so``, or the folder that it was exported to.
        threads: number of threads, including the caller's; default: that of the export.
        weights: the file of weights of a library that does not contain them; default: ``NAME.weights`` next to it.

    Raises:
        UsageError: there is no such library, this machine cannot run it, its weights are missing, or ``threads`` is
            less than one.
    """
    check_threads(threads)
    file = library_file(Path(path))
    name = file.stem.removeprefix("lib")
    beside = file.with_name(f"{name}.weights")
    if weights is None and beside.exists():
        weights = beside
    try:
        # By a new name: the loader takes a path that it has seen for the same library, even if the file was replaced.
        with TemporaryDirectory() as folder:
            link = Path(folder) / file.name
            link.symlink_to(file.resolve())
            library = ctypes.CDLL(str(link))
        functions = {one: getattr(library, f"{name}_{one}") for one in _SIGNATURES}
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be loaded on this machine: {error}.") from error
    except AttributeError as error:
        raise UsageError(f"{str(file)!r} was not written by 'repvgg export --to c', or was renamed.") from error
    return CompiledLibrary(functions, threads, None if weights is None else Path(weights))


def load_archive(path: Path, *, weights: Path | None = None) -> CompiledLibrary:
    """Load ``libNAME.a`` by LLVM's linker, for machines without another one. Its code lives until the process ends.

    Raises:
        UsageError: this machine cannot run it.
        MissingDependencyError: llvmlite is not installed.
    """
    name = path.stem.removeprefix("lib")
    code = MachineCode(read_archive(path), host_isa())
    _kept.append(code)
    functions = {}
    for one, (result, *parameters) in _SIGNATURES.items():
        functions[one] = ctypes.CFUNCTYPE(result, *parameters)(code.address(f"{name}_{one}"))
    return CompiledLibrary(functions, None, weights)


_kept: list[MachineCode] = []  # code that destroys networks when they are collected


def library_file(path: Path) -> Path:
    """Return the library of a folder, or the file itself.

    Raises:
        UsageError: there is none, or there are several.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"There is no file {str(path)!r}: export it with 'repvgg export --to c'.")
        return path
    found = sorted(path.glob("lib*.so"))
    if len(found) != 1:
        raise UsageError(f"{str(path)!r} has {len(found)} files lib*.so: name one.")
    return found[0]


@final
class CompiledLibrary:
    """A network of a C library: ``logits = library(images)``, with the inputs of a compiled model.

    Batches larger than :attr:`max_images` run in parts. The images have the size that was exported.

    Args:
        functions: those of ``model.h`` by name, without their prefix. Their code must live as long as the process.
        threads: see :func:`load`.
        weights: the file of weights, or None.

    Attributes:
        input_shapes: (N, C, H, W) of each input, where N is the largest batch of one call of the library.
        output_shapes: of one image, of each output.
        threads: number of threads, including the caller's.
        version: what was exported, by which version, for which processors.

    Raises:
        UsageError: the library refused to create a network; the text says why.
    """

    def __init__(self, functions: Mapping[str, Any], threads: int | None, weights: Path | None) -> None:
        for name, function in functions.items():
            result, *parameters = _SIGNATURES[name]
            function.restype, function.argtypes = result, parameters
        self._functions = functions
        handle = _POINTER()
        path = None if weights is None else os.fsencode(weights)
        if functions["create"](path, threads or 0, ctypes.byref(handle)) != OK:
            raise UsageError(functions["last_error"](None).decode())
        self._handle = handle
        weakref.finalize(self, functions["destroy"], handle)
        self.max_images: int = functions["max_images"]()
        self.input_shapes: tuple[Shape, ...] = tuple(
            (self.max_images, *_shape_of(functions["input_shape"], index)) for index in range(functions["num_inputs"]())
        )
        self.output_shapes = [
            _shape_of(functions["output_shape"], index) for index in range(functions["num_outputs"]())
        ]
        self.threads: int = functions["threads"](handle)
        self.version: str = functions["version"]().decode()

    def __call__(self, *inputs: Any) -> Any:
        """Compute the outputs for float32 images (n, C, H, W): tensors for tensors, arrays for arrays.

        Images of any strides are read in place. A network of several outputs returns a tuple, in the order in which
        the exported model returns them; n may be 0.

        Raises:
            UsageError: the images have another shape, dtype or device, or another thread is running this network.
        """
        views = view_inputs(inputs, [shape[1] for shape in self.input_shapes])
        for view, shape in zip(views, self.input_shapes, strict=True):
            if view.shape[1:] != shape[1:]:
                raise UsageError(f"This network was exported for images of {shape[1:]}, got {view.shape[1:]}.")
        count = views[0].shape[0]
        outputs = [np.empty((count, *shape), np.float32) for shape in self.output_shapes]
        for first in range(0, count, self.max_images):
            self._run(views, outputs, first, min(self.max_images, count - first))
        values = [torch.from_numpy(one) if isinstance(inputs[0], Tensor) else one for one in outputs]
        return values[0] if len(values) == 1 else tuple(values)

    def _run(self, views: Sequence[InputView], outputs: Sequence[Floats], first: int, count: int) -> None:
        addresses = [view.address + first * view.strides[0] * outputs[0].itemsize for view in views]
        strides = np.array([view.strides for view in views], np.int64)
        status = self._functions["run_strided"](
            self._handle,
            count,
            (_POINTER * len(views))(*addresses),
            strides.ctypes.data,
            (_POINTER * len(outputs))(*(one[first:].ctypes.data for one in outputs)),
        )
        if status == BUSY:
            raise UsageError("This network is running in another thread: load one for each thread.")
        if status != OK:
            raise UsageError(self._functions["last_error"](self._handle).decode())

    def __repr__(self) -> str:
        return f"<CompiledLibrary {self.version}, {self.threads} threads>"


def _shape_of(function: Callable[..., int], index: int) -> tuple[int, ...]:
    shape = (_LONG * MAX_RANK)()
    return tuple(shape[: function(index, shape)])
