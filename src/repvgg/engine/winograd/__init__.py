"""Winograd convolution, from the exact matrices to kernels.

filters.py      F(m, 3) as exact matrices: interpolation points, edge tiles, stride 2
tiling.py       tiles and blocks of a feature map; the memory layout of transformed tiles
transforms.py   code of the input and output transforms
gemm.py         code of the batched GEMMs, with filters stored transformed or transformed on the fly
convolution.py  the kernels of both schedules: staged and fused
"""
