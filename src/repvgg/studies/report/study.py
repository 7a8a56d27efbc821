"""The page of a study: what it says, its pictures, its tables, and how to get it again."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote

from repvgg.studies.cells import Header
from repvgg.studies.report.charts import Chart
from repvgg.studies.report.formatting import timestamp
from repvgg.studies.report.layout import document, figures, footer, section
from repvgg.studies.report.markup import Child, Markup, element, join
from repvgg.studies.tables import Table

_STAMP = ("gpu", "cpu", "torch", "threads")
_WORDS = {"torch": "torch {}", "threads": "{} threads"}


def render_study(
    title: str,
    about: str,
    lead: str,
    tables: Sequence[Table],
    pictures: Sequence[Chart],
    drawings: Mapping[str, str],
    header: Header,
) -> str:
    """The page as one HTML document that loads nothing.

    Args:
        title: of the study.
        about: what is measured, and how, in paragraphs.
        lead: what came out, in a sentence.
        tables: with all their rows.
        pictures: what they show, in words.
        drawings: each of them as SVG, by name.
        header: when, where and with which settings.
    """
    parts = (
        _top(title, lead, header),
        *(_picture(picture, drawings[picture.name]) for picture in pictures),
        *map(_table, tables),
        section("how", "How it was measured", None, *(element("p", part) for part in about.split("\n\n"))),
        _files(header.study, tables, pictures),
        _footer(header),
    )
    return document(title, *parts)


def _top(title: str, lead: str, header: Header) -> Markup:
    machine = (_WORDS.get(key, "{}").format(header.environment[key]) for key in _STAMP if key in header.environment)
    stamp = [timestamp(header.finished or header.started), *machine]
    unfinished = element(
        "p", element("span", "Interrupted: some of it is missing", class_="badge bad"), class_="badges"
    )
    return element(
        "header",
        element("p", join("repvgg", element("span", " / "), header.study), class_="eyebrow"),
        element("h1", title),
        element("p", lead, class_="sentence"),
        None if header.finished else unfinished,
        element("ul", (element("li", entry) for entry in stamp), class_="stamp", aria_label="When and where"),
    )


def _picture(picture: Chart, svg: str) -> Markup:
    """Inside the page as an image, so that neither its style nor its identifiers meet those of the page."""
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
    return element("figure", element("img", src=source, alt=picture.words), class_="drawn", id=picture.name)


def _table(table: Table) -> Markup:
    titles, *rows = table.cells
    body = figures(table.title, titles, ((row[0], row[1:]) for row in rows), "study")
    return section(f"table-{table.name}", table.title, None, body, *_notes(table.notes))


def _notes(notes: Iterable[str]) -> Iterator[Markup]:
    for note in notes:
        yield element("p", note, class_="quiet")


def _files(study: str, tables: Sequence[Table], pictures: Sequence[Chart]) -> Markup:
    rows = [(f"{table.name}.csv", f"{table.title}, for spreadsheets") for table in tables]
    rows += [(f"{picture.name}.{suffix}", picture.words) for picture in pictures for suffix in ("svg", "png")]
    rows += [(f"{study}.json", "all of it, for programs"), (f"{study}.md", "all of it, for people")]
    links: list[tuple[Markup, Sequence[Child]]] = [
        (element("a", name, href=f"./{quote(name)}"), (purpose,)) for name, purpose in rows
    ]
    return section("folder", "What is in this folder", None, figures("Files", ("File", "What it is"), links, "files"))


def _footer(header: Header) -> Markup:
    facts = {**header.environment, **header.settings, "started": header.started}
    return footer("Times depend on the machine, and on what else it does.", header.command, facts)
