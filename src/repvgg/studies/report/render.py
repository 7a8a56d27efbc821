"""Render report pages with Jinja2: one for the quickstart's ``report.json``, one for a study.

A page is a single HTML file that loads nothing. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import numpy as np

from repvgg.errors import require
from repvgg.studies.report import formatting
from repvgg.studies.report.charts import Chart
from repvgg.studies.report.page_charts import LogScale, accuracy_chart, error_chart, loss_chart, timing_chart
from repvgg.studies.report.schema import Check, Epoch, Region, Report, Timing
from repvgg.studies.store import Header
from repvgg.studies.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_Charts: TypeAlias = "dict[str, Markup]"

_MOST_BRANCHES = 6  # boxes side by side in a diagram; the last one says how many more there are
_STAMP = {"gpu": "{}", "cpu": "{}", "torch": "torch {}", "threads": "{} threads"}


def render_quickstart(report: Report) -> str:
    """Render the page of a quickstart; :meth:`Report.from_dict` reads the report from ``report.json``.

    Raises:
        MissingDependencyError: Jinja2 or Matplotlib is not installed.
    """
    regions = report.regions
    rounds = sorted({timing.rounds for timing in report.timings})
    return _render(
        "quickstart.html.j2",
        report=report,
        charts=_charts(report.training.history, report.evidence, report.timings),
        stamp=_stamp(report.created, report.environment),
        dataset=report.data.name.rstrip(":"),  # "digits:" is a source without arguments
        num_branches=sum(len(region.branches) for region in regions),
        # Two branches among blocks of three leave the lane of the absent identity empty.
        slots=min(3, max((len(region.branches) for region in regions), default=1)),
        error_scale=LogScale.around(
            error for region in regions for error in (region.error_made, region.error_arriving)
        ),
        rounds=" to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1])))) if rounds else "",
        facts={
            "seed": report.seed,
            "data": report.data.name,
            **report.environment,
            "report schema": report.schema_version,
        },
    )


def render_study(
    title: str,
    about: str,
    lead: str,
    tables: Sequence[Table],
    charts: Sequence[Chart],
    drawings: Mapping[str, str],
    header: Header,
) -> str:
    """Render the page of a study.

    Args:
        title: of the study.
        about: how it is measured; paragraphs separated by empty lines.
        lead: the result in one sentence.
        tables: with all their rows.
        charts: in their order.
        drawings: HTML of each chart by its name, from :func:`.charts.write_chart`.
        header: date, machine and settings.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    files = [(f"{table.name}.csv", f"{table.title}, for spreadsheets") for table in tables]
    files += [(f"{chart.name}.{suffix}", chart.description) for chart in charts for suffix in ("svg", "png")]
    files += [(f"{header.study}.json", "all results, for programs"), (f"{header.study}.md", "all results, to read")]
    return _render(
        "study.html.j2",
        title=title,
        about=about,
        lead=lead,
        tables=tables,
        charts=charts,
        drawings=drawings,
        header=header,
        stamp=_stamp(header.finished or header.started, header.environment),
        files=files,
        facts={**header.environment, **header.settings, "started": header.started},
    )


def render_page(template: str, *, created: str, machine: Mapping[str, str], **context: Any) -> str:
    """Render a template with a stamp of time and machine.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    return _render(template, stamp=_stamp(created, machine), **context)


def training_charts(history: tuple[Epoch, ...], accuracy_title: str = "Validation accuracy") -> _Charts:
    """Return the drawings ``loss`` and ``accuracy`` of a training; the title says what the accuracy is.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    return _charts(history, (), (), accuracy_title)


def _render(template: str, **context: Any) -> str:
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    jinja2 = require("jinja2", "study")
    environment: Environment = jinja2.Environment(
        loader=jinja2.PackageLoader("repvgg.studies.report", ""),  # finds the templates in a wheel, too
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not an empty text
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Before escaping; markup is a subclass of str.
        finalize=lambda value: formatting.printable(value) if type(value) is str else value,
    )
    filters = (
        formatting.duration,
        formatting.file_size,
        formatting.integer,
        formatting.multiplication_signs,
        formatting.percentage,
        formatting.power_of_ten,
        formatting.ratio,
        formatting.scientific,
        branch_kind,
        breakable,
        fit_branches,
        geometry,
        millions,
        png_data_uri,
        url_path,
    )
    environment.filters |= {function.__name__: function for function in filters}
    environment.globals |= {"quantity": formatting.quantity, "relative_change": formatting.relative_change}
    return environment


# The quickstart renders its page until the file sizes in it are right; the charts are the same each time.
@lru_cache(maxsize=2)
def _charts(
    history: tuple[Epoch, ...],
    checks: tuple[Check, ...],
    timings: tuple[Timing, ...],
    accuracy_title: str = "Validation accuracy",
) -> _Charts:
    drawings: dict[str, str] = {}
    if history:
        drawings |= {"loss": loss_chart(history), "accuracy": accuracy_chart(history, accuracy_title)}
    if checks:
        drawings["errors"] = error_chart(checks)
    if timings:
        drawings["timings"] = timing_chart(timings)
    return {name: as_markup(drawing) for name, drawing in drawings.items()}


def as_markup(html: str) -> Markup:
    """Mark HTML of our own as such, so that a template does not escape it.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    markup: Markup = require("markupsafe", "study").Markup(html)
    return markup


def _stamp(created: str, environment: Mapping[str, str]) -> list[str]:
    found = {key.lower(): value for key, value in environment.items()}
    machine = (words.format(found[key]) for key, words in _STAMP.items() if key in found)
    return [formatting.timestamp(created), *machine]


def branch_kind(branch: str) -> str:
    """Return the CSS class of a branch: ``wide``, ``point`` or ``straight``; ``more`` for "+3 more"."""
    if branch.startswith("+"):
        return "more"
    kernel = re.search(r"(\d+)\s*[x×]\s*(\d+)", branch)
    if kernel is None:
        return "straight" if "identity" in branch.lower() else "wide"
    return "point" if kernel.groups() == ("1", "1") else "wide"


def fit_branches(branches: Sequence[str]) -> list[str]:
    """Return the branches to draw; where there are too many, the last one says how many are left out."""
    if len(branches) <= _MOST_BRANCHES:
        return list(branches)
    return [*branches[: _MOST_BRANCHES - 1], f"+{len(branches) - _MOST_BRANCHES + 1} more"]


def geometry(region: Region) -> str:
    """Describe channels, stride and groups: ``16 → 32 channels, stride 2``. Lines break after a comma only."""
    parts = [f"{region.in_channels} → {region.out_channels} channels"]
    if any(step != 1 for step in region.stride):
        parts.append(f"stride {'×'.join(map(str, dict.fromkeys(region.stride)))}")
    if region.groups != 1:
        parts.append(f"{region.groups} groups")
    return ", ".join(part.replace(" ", "\u00a0") for part in parts)


def breakable(name: str) -> Markup:
    """Allow a line break after each dot of a module path."""
    markupsafe = require("markupsafe", "study")
    path: Markup = markupsafe.escape(formatting.printable(name))
    return path.replace(".", markupsafe.Markup(".<wbr>"))


def millions(value: int) -> str:
    """Format a count in units of a million: ``12.0``."""
    return f"{value / 1e6:,.1f}"


def png_data_uri(pixels: Sequence[Sequence[int]]) -> str:
    """Encode rows of gray values in [0, 255] as a PNG in a data URI."""
    require("PIL", "study")  # comes with Matplotlib
    from PIL import Image

    buffer = BytesIO()
    # Gray images of 32x32 pixels compress to about 600 bytes each.
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def url_path(name: str) -> str:
    """Quote a file name for a link, including colons: ``javascript:`` must not become a scheme."""
    return quote(name)
