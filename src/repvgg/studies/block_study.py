"""Every block of the table in the same network.

repvgg study blocks
"""

from __future__ import annotations

from repvgg.studies.ablation import ablation
from repvgg.studies.ablation_summary import largest_losses
from repvgg.studies.contenders import all_blocks

STUDY = ablation(
    "blocks",
    "Every block of the table, in the same network",
    "Each block stands in the place of every 3×3 convolution of the same RepVGG. Left out are UniRepLK, which has no "
    "such kernels, and blocks that are another row with them: RepLK (RepVGG w/o identity), ExpandNet-CK (conv-BN) and "
    "QARepVGG S2 (Identity w/o BN). Where a block has no form in some layer's geometry, as RepMixer has none where the "
    "shape changes, that layer is a convolution with its batch norm, and the table says so.",
    all_blocks,
    largest_losses,
)
