"""The way back: a plain network becomes one with more to train, and computes the same function at that moment."""

from repvgg.expansion.api import expand, insert_bn, replace_convs
from repvgg.expansion.fitting import rep_block
from repvgg.expansion.report import Expanded, ExpandReport, Kept

__all__ = ["ExpandReport", "Expanded", "Kept", "expand", "insert_bn", "rep_block", "replace_convs"]
