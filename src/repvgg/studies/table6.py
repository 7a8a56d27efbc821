"""Table 6 of the paper: RepVGG-B0 with branches removed, trained again and again, small.

repvgg study table6
"""

from __future__ import annotations

from repvgg.studies.ablation import ablation
from repvgg.studies.ablation_summary import Results, largest_losses
from repvgg.studies.contenders import BRANCHES, Contender

_NO_IDENTITY, _NO_POINTWISE = "repvgg_no_identity", "repvgg_no_pointwise"


def _rows() -> tuple[Contender, ...]:
    return BRANCHES


def _lead(results: Results) -> str:
    """Whether the identity is worth more than the 1x1 branch, as in the paper."""
    identity, pointwise = results.behind(_NO_IDENTITY), results.behind(_NO_POINTWISE)
    if not (identity.values and pointwise.values):
        return largest_losses(results)
    return (
        f"Removing the identity changes the accuracy by {identity} points here (in the paper −1.99), removing the 1×1 "
        f"branch by {pointwise} (−0.35), both by {results.behind('conv_bn')} (−2.75)."
    )


STUDY = ablation(
    "table6",
    "Table 6: which branches matter",
    "RepVGG with and without its identity branch and its 1×1 branch, in every block.",
    _rows,
    _lead,
)
