"""The one judge of the library: two callables and some inputs in, :class:`Evidence` out."""

from repvgg.verify.evidence import Agreement, Evidence, LayerEvidence
from repvgg.verify.inputs import border_inputs
from repvgg.verify.judge import verify
from repvgg.verify.precision import UNIT_ROUNDOFF
from repvgg.verify.state import judging

__all__ = ["UNIT_ROUNDOFF", "Agreement", "Evidence", "LayerEvidence", "border_inputs", "judging", "verify"]
