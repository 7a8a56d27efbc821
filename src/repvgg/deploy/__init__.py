"""Getting a model out of PyTorch: files of several kinds, what runs them, and the way that ends in a judged file."""

from repvgg.deploy.onnx_export import OnnxExport, export_onnx
from repvgg.deploy.onnx_runner import OnnxRunner
from repvgg.deploy.program import ProgramExport, ProgramRunner, export_program
from repvgg.deploy.shipping import SUFFIXES, Shipped, check_target, images_for, ship
from repvgg.deploy.weights_file import export_weights

__all__ = [
    "SUFFIXES",
    "OnnxExport",
    "OnnxRunner",
    "ProgramExport",
    "ProgramRunner",
    "Shipped",
    "check_target",
    "export_onnx",
    "export_program",
    "export_weights",
    "images_for",
    "ship",
]
