"""``report.html``: one self-contained page, rendered from the same report that is saved as ``report.json``.

Needs the standard library only. ``schema`` says what a report holds, ``render`` draws it.
"""

from repvgg.studies.report.document import render
from repvgg.studies.report.schema import (
    SCHEMA_VERSION,
    Data,
    Epoch,
    File,
    Judgement,
    Left,
    Model,
    NextCommand,
    Region,
    Report,
    Role,
    Sample,
    Timing,
    Training,
)

__all__ = [
    "SCHEMA_VERSION",
    "Data",
    "Epoch",
    "File",
    "Judgement",
    "Left",
    "Model",
    "NextCommand",
    "Region",
    "Report",
    "Role",
    "Sample",
    "Timing",
    "Training",
    "render",
]
