"""Compiled CPU passes that train branches whose outputs are batch-normalized and summed.

``dispatch`` decides when they replace the definition in a block's ``forward``, ``joint_conv`` runs the convolutions,
``fused_bn_sum`` runs the batch norms, their sum and the ReLU, and ``build`` compiles the C++ source.
"""
