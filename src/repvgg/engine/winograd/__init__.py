"""Winograd convolution: minimal filters, tiles, transforms, GEMMs in the transformed domain, kernels."""
