"""Self-describing checkpoint files."""

from repvgg.checkpoints.files import Checkpoint, read_checkpoint, save_checkpoint
from repvgg.checkpoints.metadata import Form, Metadata

__all__ = ["Checkpoint", "Form", "Metadata", "read_checkpoint", "save_checkpoint"]
