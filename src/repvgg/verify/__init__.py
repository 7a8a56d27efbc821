"""Check that two callables compute the same function: inputs in, :class:`Evidence` out."""

from repvgg.verify.comparison import UNIT_ROUNDOFF, verify
from repvgg.verify.evidence import Agreement, Evidence, LayerEvidence, OutputEvidence
from repvgg.verify.execution import border_inputs, isolated_eval

judging = isolated_eval  # former name

__all__ = [
    "UNIT_ROUNDOFF",
    "Agreement",
    "Evidence",
    "LayerEvidence",
    "OutputEvidence",
    "border_inputs",
    "isolated_eval",
    "judging",
    "verify",
]
