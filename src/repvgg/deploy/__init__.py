"""Getting a model out of PyTorch: ONNX files and the runtime that runs them."""

from repvgg.deploy.onnx_export import OnnxExport, export_onnx
from repvgg.deploy.onnx_runner import OnnxRunner

__all__ = ["OnnxExport", "OnnxRunner", "export_onnx"]
