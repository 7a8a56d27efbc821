"""Export models to files, run them, and ship a file only after it has been verified."""

from repvgg.deploy.loading import PROGRAM_SUFFIXES, ExportedModule, LoadedProgram, load_program, load_runner, target_of
from repvgg.deploy.onnx import OnnxExport, OnnxRunner, export_onnx
from repvgg.deploy.shipping import SUFFIXES, Shipped, check_target, export_weights, images_for, ship
from repvgg.deploy.torch_export import ProgramExport, ProgramRunner, export_program

__all__ = [
    "PROGRAM_SUFFIXES",
    "SUFFIXES",
    "ExportedModule",
    "LoadedProgram",
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
    "load_program",
    "load_runner",
    "ship",
    "target_of",
]
