"""The collapse room."""
