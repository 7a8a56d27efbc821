"""A sum of branches, and how it is trained."""

from __future__ import annotations

from functools import reduce
from operator import add

from torch import Tensor, nn

from repvgg.blocks.fused import trained


class BranchSum(nn.ModuleDict):
    """Named branches on one input, summed: ``y = Σ_k branch_k(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of all branches on ``x``."""
        fast = trained(self, x)
        out: Tensor = reduce(add, (branch(x) for branch in self.values())) if fast is None else fast
        return out
