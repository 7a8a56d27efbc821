"""The checkpoints room."""
