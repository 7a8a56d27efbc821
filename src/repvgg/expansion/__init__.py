"""The inverse of a collapse: give a plain network more parameters to train, without changing what it computes."""

from repvgg.expansion.api import expand, insert_bn, replace_convs
from repvgg.expansion.fitting import rep_block
from repvgg.expansion.report import Expanded, ExpandReport, Kept, Skipped

__all__ = ["ExpandReport", "Expanded", "Kept", "Skipped", "expand", "insert_bn", "rep_block", "replace_convs"]
