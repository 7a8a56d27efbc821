"""Self-describing checkpoint files."""

from repvgg.checkpoints.files import Checkpoint, common_prefix, read_checkpoint, save_checkpoint, save_tensors
from repvgg.checkpoints.metadata import Form, Metadata

__all__ = ["Checkpoint", "Form", "Metadata", "common_prefix", "read_checkpoint", "save_checkpoint", "save_tensors"]
