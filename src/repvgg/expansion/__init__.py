"""The inverse of a collapse: give a plain network more parameters to train, without changing what it computes."""

from repvgg.expansion.api import Expanded, ExpandReport, Kept, Skipped, expand, insert_bn, replace_convs
from repvgg.expansion.fitting import rep_block

__all__ = ["ExpandReport", "Expanded", "Kept", "Skipped", "expand", "insert_bn", "rep_block", "replace_convs"]
