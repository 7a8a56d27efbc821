"""The command line. :mod:`repvgg.cli.app` dispatches to a module for each command."""

from repvgg.cli.app import main

__all__ = ["main"]
