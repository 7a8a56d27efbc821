"""The planner: from layers and an input shape to a list of kernels on buffers.

plan.py             the passes in their order: batch chunks, layouts, lowering, buffer sharing
algorithms.py       the search space of a convolution
cost_model.py       selects an algorithm by estimated cycles
machine_costs.py    what the cost model knows about a processor
calibration.py      fits that to a processor that it does not know
autotune.py         selects an algorithm by measuring
selection_cache.py  keeps both kinds of selections on disk
"""
