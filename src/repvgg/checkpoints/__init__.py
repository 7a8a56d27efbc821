"""Checkpoint files: those that describe themselves, and those of other libraries."""

from repvgg.checkpoints.files import Checkpoint, read_checkpoint, save_checkpoint, save_tensors, save_torch
from repvgg.checkpoints.layouts import LAYOUTS, GatePlace, Layout
from repvgg.checkpoints.metadata import Form, Metadata
from repvgg.checkpoints.translation import (
    Account,
    Naming,
    is_plain_form,
    own_names,
    recognize_names,
    rename_to,
    translate,
)
from repvgg.checkpoints.wrappers import common_prefix

__all__ = [
    "LAYOUTS",
    "Account",
    "Checkpoint",
    "Form",
    "GatePlace",
    "Layout",
    "Metadata",
    "Naming",
    "common_prefix",
    "is_plain_form",
    "own_names",
    "read_checkpoint",
    "recognize_names",
    "rename_to",
    "save_checkpoint",
    "save_tensors",
    "save_torch",
    "translate",
]
