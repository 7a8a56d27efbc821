"""The algebra room."""
