"""Ahead-of-time compilation: a plan as a C library without dependencies, and its use from Python."""
