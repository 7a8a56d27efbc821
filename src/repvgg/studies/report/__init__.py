"""Report pages: ``report.json`` and ``report.html`` of the quickstart, and the page and charts of a study.

:mod:`.schema` defines the content of ``report.json``, :mod:`.render` fills the Jinja2 templates, :mod:`.charts` and
:mod:`.page_charts` draw with Matplotlib.
"""

from repvgg.studies.report.render import render_quickstart, render_study
from repvgg.studies.report.schema import (
    SCHEMA_VERSION,
    Check,
    Data,
    Epoch,
    File,
    Model,
    NextCommand,
    Region,
    Report,
    Role,
    Sample,
    Timing,
    Training,
    Unchanged,
)

__all__ = [
    "SCHEMA_VERSION",
    "Check",
    "Data",
    "Epoch",
    "File",
    "Model",
    "NextCommand",
    "Region",
    "Report",
    "Role",
    "Sample",
    "Timing",
    "Training",
    "Unchanged",
    "render_quickstart",
    "render_study",
]
