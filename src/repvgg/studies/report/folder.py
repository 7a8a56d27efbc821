"""The end of the page: the files beside it, what to try next, and how to get all of it again."""

from __future__ import annotations

from urllib.parse import quote

from repvgg.studies.report import layout
from repvgg.studies.report.formatting import file_size
from repvgg.studies.report.layout import code, figures, section
from repvgg.studies.report.markup import Child, Markup, element, join
from repvgg.studies.report.schema import File, Report


def folder(report: Report) -> Markup:
    """The files, each linked."""
    if not report.files:
        return section("folder", "What is in this folder", "Nothing but this page.")
    rows = figures("Files of this run", ("File", "Size", "What it is for"), map(_file, report.files), "files")
    return section("folder", "What is in this folder", None, rows)


def _file(file: File) -> tuple[Markup, tuple[Child, ...]]:
    return element("a", file.name, href=f"./{quote(file.name)}"), (file_size(file.bytes), file.purpose)


def next_commands(report: Report) -> Markup | None:
    """Commands to copy; one click selects a whole one."""
    if not report.next_commands:
        return None
    steps = (join(element("p", step.purpose), code(step.command)) for step in report.next_commands)
    return section("next", "Try next", None, element("ol", (element("li", step) for step in steps), class_="commands"))


def footer(report: Report) -> Markup:
    """Seed, versions, and the command that makes this page again."""
    facts = {"seed": report.seed, "data": report.data.name, **report.environment}
    return layout.footer(
        "The same seed gives the same weights; times depend on the machine.",
        report.command,
        {**facts, "report schema": report.schema_version},
        element("p", "Everything on this page is in report.json beside it.", class_="quiet"),
    )
