"""OpenVINO on the CPU, in float32 and with the threads of PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from repvgg.errors import require


def openvino_core() -> Any:
    """Return ``openvino.Core()``.

    Raises:
        MissingDependencyError: openvino is not installed.
    """
    return require("openvino", "openvino").Core()


def compile_for_cpu(core: Any, graph: Any, threads: int | None = None) -> Any:
    """Return an inference request for a graph that ``core`` has read; ``threads`` are by default those of PyTorch."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 where the CPU has it
        "INFERENCE_NUM_THREADS": str(threads or torch.get_num_threads()),
    }
    return core.compile_model(graph, "CPU", settings).create_infer_request()
