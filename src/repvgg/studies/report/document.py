"""The page as a whole."""

from __future__ import annotations

from repvgg.studies.report.equality import equality
from repvgg.studies.report.folder import folder, footer, next_commands
from repvgg.studies.report.layout import document
from repvgg.studies.report.learning import learning
from repvgg.studies.report.network import network
from repvgg.studies.report.predictions import confusion, samples
from repvgg.studies.report.schema import Report
from repvgg.studies.report.speed import speed
from repvgg.studies.report.summary import header, key_figures

_SECTIONS = (header, key_figures, network, learning, equality, speed, confusion, samples, folder, next_commands, footer)


def render(report: Report) -> str:
    """The report as one HTML page that loads nothing: style, drawings and images are all inside.

    It depends on ``report`` alone: the same report gives the same bytes. All text in it is escaped.

    Args:
        report: what was measured; :meth:`Report.from_dict` reads one from ``report.json``.

    Returns:
        A complete HTML document, to be written as UTF-8.
    """
    return document(f"{report.model.name}: before and after folding", *(part(report) for part in _SECTIONS))
