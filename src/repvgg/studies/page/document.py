"""The page as a whole."""

from __future__ import annotations

from repvgg.studies.page.equality import equality
from repvgg.studies.page.folder import folder, footer, next_commands
from repvgg.studies.page.layout import document
from repvgg.studies.page.learning import learning
from repvgg.studies.page.network import network
from repvgg.studies.page.predictions import confusion, samples
from repvgg.studies.page.schema import Report
from repvgg.studies.page.speed import speed
from repvgg.studies.page.summary import header, key_figures

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
