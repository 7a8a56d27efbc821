"""Kernels that are not Winograd's: direct convolution, and memory-bound steps; and what all kernels share (base.py)."""
