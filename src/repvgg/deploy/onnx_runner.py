"""Run an ONNX file in ONNX Runtime, as a function from tensor to tensor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from repvgg.errors import ExportError, UsageError, first_line, require

_DTYPES = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16}
_ERRORS_ONLY = 3


@final
class OnnxRunner:
    """An ONNX file with one input and one output, loaded in ONNX Runtime on the CPU: ``logits = runner(images)``.

    Args:
        path: the file.
        threads: threads for one operator; None leaves it to ONNX Runtime, which takes every physical core.

    Attributes:
        path: the file.
        input_shape: axes of the input; None where the file leaves one open.
        dtype: of the input.

    Raises:
        ExportError: no such file, no valid ONNX file, or not one input and one output.
        UsageError: ``threads`` below 1.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"ONNX Runtime needs at least one thread, not {threads}.")
        self.path = Path(path)
        self._session = _session(self.path, threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type not in _DTYPES:
            raise ExportError(f"{str(path)!r} is not a network from one floating point tensor to one tensor.")
        self._input, self._output = inputs[0].name, outputs[0].name
        self.input_shape = tuple(axis if isinstance(axis, int) else None for axis in inputs[0].shape)
        self.dtype = _DTYPES[inputs[0].type]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the network on ``x``, on the CPU.

        Raises:
            UsageError: ``x`` has another shape or dtype than the file asks for.
        """
        self._check(x)
        (out,) = self._session.run([self._output], {self._input: x.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(out)

    def __repr__(self) -> str:
        return f"OnnxRunner({str(self.path)!r})"

    def _check(self, x: Tensor) -> None:
        fits = x.ndim == len(self.input_shape) and all(
            wanted in (None, axis) for wanted, axis in zip(self.input_shape, x.shape, strict=True)
        )
        if not fits or x.dtype != self.dtype:
            wanted = ", ".join("N" if axis is None else str(axis) for axis in self.input_shape)
            raise UsageError(
                f"{str(self.path)!r} takes {self.dtype} of shape ({wanted}), not {x.dtype} of shape {tuple(x.shape)}."
            )


def _session(path: Path, threads: int | None) -> Any:
    runtime = require("onnxruntime")
    if not path.is_file():
        raise ExportError(f"There is no file {str(path)!r}: export the model first.")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise ExportError(f"{str(path)!r} cannot be loaded by ONNX Runtime: {first_line(error)}.") from error
