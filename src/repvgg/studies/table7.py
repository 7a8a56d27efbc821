"""Table 7 of the paper: variants of the block, other re-parameterizations, and real shortcuts.

repvgg study table7
"""

from __future__ import annotations

from repvgg.studies.ablation import ablation
from repvgg.studies.ablation_summary import largest_losses
from repvgg.studies.contenders import VARIANTS, Contender


def _rows() -> tuple[Contender, ...]:
    return VARIANTS


STUDY = ablation(
    "table7",
    "Table 7: variants of the block, and other ways",
    "All rows have the layers of the same RepVGG; only what stands in the place of each 3×3 convolution differs, and "
    "in Residual Reorg the shortcuts, which stay.",
    _rows,
    largest_losses,
)
