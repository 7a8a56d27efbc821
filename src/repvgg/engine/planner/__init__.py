"""The planner: from layers and an input shape to a list of kernels on buffers.

plan.py         the passes in their order: batch chunks, layouts, lowering, buffer sharing
algorithms.py   the search space of a convolution
cost_model.py   selects an algorithm by estimated cycles
autotune.py     selects an algorithm by measuring, and caches the result on disk
"""
