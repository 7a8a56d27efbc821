"""Checkpoint files: of this library, with a header, and of others, recognized by their names."""

from repvgg.checkpoints.files import (
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_tensors,
    save_torch,
)
from repvgg.checkpoints.layouts import (
    LAYOUTS,
    Account,
    GatePlace,
    Layout,
    Naming,
    identity_naming,
    is_plain_form,
    recognize_names,
    rename_to,
    translate,
)
from repvgg.checkpoints.metadata import Form, Metadata
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
    "identity_naming",
    "is_plain_form",
    "read_checkpoint",
    "recognize_names",
    "rename_to",
    "save_checkpoint",
    "save_tensors",
    "save_torch",
    "translate",
]
