"""The page as a whole."""

from __future__ import annotations

from importlib.resources import files

from repvgg.studies.page.equality import equality
from repvgg.studies.page.folder import folder, footer, next_commands
from repvgg.studies.page.learning import learning
from repvgg.studies.page.markup import Markup, element, join, stylesheet
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
    body = element("main", *(part(report) for part in _SECTIONS))
    page = element("html", _head(report), element("body", body), lang="en")
    return f"<!doctype html>\n{page}\n"


def _head(report: Report) -> Markup:
    css = files("repvgg.studies.page").joinpath("style.css").read_text(encoding="utf-8")
    return element(
        "head",
        join(
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", f"{report.model.name}: before and after folding"),
            stylesheet(css),
        ),
    )
