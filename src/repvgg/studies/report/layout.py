"""What all pages and sections share: head and style, headings, tables that scroll on small screens, legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from repvgg.studies.report.markup import Child, Markup, element, join, stylesheet


def document(title: str, *parts: Child) -> str:
    """A complete HTML page that loads nothing, of parts one below the other; to be written as UTF-8."""
    page = element("html", _head(title), element("body", element("main", *parts)), lang="en")
    return f"<!doctype html>\n{page}\n"


def _head(title: str) -> Markup:
    css = files("repvgg.studies.report").joinpath("style.css").read_text(encoding="utf-8")
    return element(
        "head",
        join(
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", title),
            stylesheet(css),
        ),
    )


def footer(note: str, command: str, facts: Mapping[str, object], *more: Child) -> Markup:
    """How to get a page again, and what is to be known of the run behind it."""
    entries = (element("div", element("dt", name), element("dd", str(value))) for name, value in facts.items())
    return element(
        "footer",
        element("h2", "How to get this page again", id="again-title"),
        element("p", note),
        code(command),
        element("dl", entries, class_="facts"),
        *more,
    )


def section(anchor: str, title: str, lead: Child, *body: Child) -> Markup:
    """A section with its heading and one sentence on what to see in it."""
    heading = element("h2", title, id=f"{anchor}-title")
    intro = element("p", lead, class_="lead") if lead else None
    return element("section", heading, intro, *body, id=anchor, aria_labelledby=f"{anchor}-title")


def table(caption: str, head: Markup, rows: Iterable[Markup], class_: str, foot: Markup | None = None) -> Markup:
    """A table with a caption for screen readers; it scrolls sideways where the screen is too narrow."""
    body = element(
        "table",
        element("caption", caption, class_="unseen"),
        element("thead", head),
        element("tbody", rows),
        element("tfoot", foot) if foot else None,
        class_=class_,
    )
    return element("div", body, class_="scroll", role="region", tabindex="0", aria_label=caption)


def figures(caption: str, titles: Sequence[str], rows: Iterable[tuple[Child, Sequence[Child]]], class_: str) -> Markup:
    """A table of figures, each row a name and its cells. On a phone each cell carries its column's title along."""
    head = element("tr", (element("th", title, scope="col") for title in titles))
    body = (_figures_row(name, zip(titles[1:], cells, strict=True)) for name, cells in rows)
    return table(caption, head, body, f"figures {class_}")


def _figures_row(name: Child, cells: Iterable[tuple[str, Child]]) -> Markup:
    labelled = (element("td", element("div", cell), data_label=title) for title, cell in cells)
    return element("tr", element("th", name, scope="row"), labelled)


def legend(*entries: tuple[str, str]) -> Markup:
    """Pairs of a swatch's class and its meaning. The swatches are decoration; the words stand beside them."""
    keys = (
        element("li", element("span", class_=f"swatch {class_}", aria_hidden="true"), words)
        for class_, words in entries
    )
    return element("ul", keys, class_="legend")


def verdict(passed: bool, good: str, bad: str, class_: str = "verdict") -> Markup:
    """A verdict in words, with a sign and a colour."""
    sign = element("span", "✓" if passed else "✗", aria_hidden="true")
    return element("span", join(sign, " ", good if passed else bad), class_=f"{class_} {'good' if passed else 'bad'}")


def code(command: str) -> Markup:
    """A command on its own line; one click selects all of it."""
    return element("pre", element("code", command), tabindex="0")
