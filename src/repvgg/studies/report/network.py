"""The network before and after, one row of a table for each folded region, with the trunk running through."""

from __future__ import annotations

from collections.abc import Sequence

from repvgg.studies.report.drawing import LANES, cap, plain_form, train_form
from repvgg.studies.report.formatting import integer, power, quantity, relative_change, scientific
from repvgg.studies.report.layout import legend, section, table
from repvgg.studies.report.markup import Markup, breakable, element, join
from repvgg.studies.report.schema import Left, Region, Report
from repvgg.studies.report.svg import LogAxis, line, rect, strip


def network(report: Report) -> Markup:
    """The drawing, layer by layer, and what was left as it was."""
    regions = report.regions
    if not regions:
        return section("network", "The network, before and after", "Nothing was folded.", _left(report.left))
    lanes = min(LANES, max(len(region.branches) for region in regions))
    axis = LogAxis.around(error for region in regions for error in (region.error_made, region.error_arriving))
    rows = [_cap_row(_input_words(report)), *(_row(region, lanes, axis) for region in regions)]
    rows.append(_cap_row(f"{report.model.num_classes} logits"))
    drawing = table("Each block before and after folding", _head(axis), rows, "network", _foot(report))
    return section("network", "The network, before and after", _lead(regions), _legend(), drawing, _left(report.left))


def _lead(regions: Sequence[Region]) -> str:
    branches = sum(len(region.branches) for region in regions)
    return (
        f"{quantity(branches, 'branch', 'branches')} on the left became "
        f"{quantity(len(regions), 'convolution')} on the right. Data flows downwards; each row is one block, and what "
        "follows the sum is the same in both forms."
    )


def _legend() -> Markup:
    return legend(
        ("wide", "spatial convolution"),
        ("point", "1×1 convolution"),
        ("straight", "identity"),
        ("plain", "the one convolution after folding"),
        ("made", "error made by that convolution alone"),
        ("arriving", "error of its output, all layers before included"),
    )


def _head(axis: LogAxis) -> Markup:
    scale = element("span", join(element("span", power(axis.low)), element("span", power(axis.high))), class_="ends")
    errors = join("Relative error ", scale)
    titles = ("Block", "Train form", "Plain form", "Parameters", errors)
    return element("tr", (element("th", title, scope="col") for title in titles))


def _input_words(report: Report) -> str:
    model = report.model
    return f"{model.in_channels} × {model.input_size} × {model.input_size}"


def _cap_row(words: str) -> Markup:
    """The row above the first block, or under the last one: what goes in, or what comes out."""
    before, after = cap(words), cap(words, plain=True)
    cells = (element("td", before, class_="form train"), element("td", after, class_="form after"))
    return element("tr", element("td"), *cells, element("td"), element("td"), class_="cap", aria_hidden="true")


def _row(region: Region, lanes: int, axis: LogAxis) -> Markup:
    return element(
        "tr",
        element("th", join(element("span", breakable(region.name), class_="name"), _geometry(region)), scope="row"),
        element("td", train_form(region, lanes), class_="form train"),
        element("td", plain_form(region), class_="form after"),
        element("td", _parameters(region.params_before, region.params_after), class_="params"),
        element("td", _errors(region, axis), class_="errors"),
    )


def _geometry(region: Region) -> Markup:
    extras = [f"{region.in_channels} → {region.out_channels} channels"]
    if any(step != 1 for step in region.stride):
        even = len(set(region.stride)) == 1
        extras.append(f"stride {region.stride[0] if even else '×'.join(map(str, region.stride))}")
    if region.groups != 1:
        extras.append(f"{region.groups} groups")
    return element("span", ", ".join(extra.replace(" ", "\u00a0") for extra in extras), class_="geometry")


def _parameters(before: int, after: int) -> Markup:
    start = element("span", join(f"{integer(before)} ", element("span", "→", class_="to")), class_="whole")
    return join(
        start, " ", element("span", integer(after), class_="whole"), element("small", relative_change(before, after))
    )


def _errors(region: Region, axis: LogAxis) -> Markup:
    return join(
        _error("made here", region.error_made, axis, "made"),
        _error("arriving", region.error_arriving, axis, "arriving"),
    )


def _error(words: str, error: float | None, axis: LogAxis, class_: str) -> Markup:
    """A label, a bar from the lowest decade of the axis, and the figure."""
    decades = [100 * step / (axis.high - axis.low) for step in range(axis.high - axis.low + 1)]
    ticks = [line(f"{at:.2f}%", 0, f"{at:.2f}%", 14, "grid") for at in decades]
    width = 0.0 if error is None else axis.position(error)
    bar = rect(0, 3, f"{width:.2f}%", 8, f"bar {class_}", radius=1.5) if width else None
    return element(
        "div",
        element("span", words, class_="what"),
        strip(14, f"relative error {words}: {scientific(error)}", *ticks, bar),
        element("span", scientific(error), class_="value"),
        class_="error",
    )


def _foot(report: Report) -> Markup:
    model = report.model
    whole = join(
        element("span", "Whole network", class_="name"),
        element("span", _macs(report), class_="geometry"),
    )
    parameters = element("td", _parameters(model.params_train, model.params_plain), class_="params")
    return element("tr", element("th", whole, scope="row", colspan="3"), parameters, element("td"))


def _macs(report: Report) -> str:
    model = report.model
    plain = f"{model.macs_plain / 1e6:,.1f} million"
    if model.macs_train is None:
        return f"{plain} multiply-adds an image"
    return f"{model.macs_train / 1e6:,.1f} → {plain} multiply-adds an image"


def _left(left: Sequence[Left]) -> Markup | None:
    if not left:
        return None
    entries = (join(element("dt", part.name), element("dd", part.reason)) for part in left)
    return join(element("h3", "Left as it was"), element("dl", entries, class_="left"))
