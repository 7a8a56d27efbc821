"""What the model gets right and wrong: the confusion matrix, and some of the images."""

from __future__ import annotations

from collections.abc import Sequence

from repvgg.studies.report.formatting import integer, percentage, quantity
from repvgg.studies.report.layout import section, table, verdict
from repvgg.studies.report.markup import Markup, element, join
from repvgg.studies.report.png import data_uri
from repvgg.studies.report.schema import Report, Sample

_STRONG = 0.75  # from this share of its row on, a cell is filled solid and its text turns over


def confusion(report: Report) -> Markup:
    """Counts of true class against predicted class."""
    classes, matrix = report.data.classes, report.training.confusion
    head = element("tr", element("td"), (element("th", name, scope="col") for name in classes))
    rows = (_row(name, index, counts) for index, (name, counts) in enumerate(zip(classes, matrix, strict=True)))
    grid = table("Confusion matrix: rows are the true class, columns the predicted one", head, rows, "confusion")
    return section("confusion", "Which are mistaken for which?", _lead(report), grid)


def _lead(report: Report) -> str:
    matrix = report.training.confusion
    total = sum(map(sum, matrix))
    right = sum(row[index] for index, row in enumerate(matrix))
    wrong = total - right
    words = "Rows are the true class, columns the predicted one. "
    if not wrong:
        return f"{words}All {integer(total)} held-out images lie on the diagonal: none is mistaken."
    return (
        f"{words}{integer(right)} of {integer(total)} held-out images lie on the diagonal, {integer(wrong)} beside it."
    )


def _row(name: str, true: int, counts: Sequence[int]) -> Markup:
    total = sum(counts)
    cells = (_cell(amount, total, true == predicted) for predicted, amount in enumerate(counts))
    return element("tr", element("th", name, scope="row"), cells)


def _cell(amount: int, total: int, right: bool) -> Markup:
    """A count on a fill as strong as its share of the row; mistakes never look faint."""
    if not amount:
        return element("td", "·", class_="none")
    strength = amount / total if right else max(0.6, amount / total)
    classes = f"{'right' if right else 'wrong'}{' strong' if strength >= _STRONG else ''}"
    return element("td", integer(amount), class_=classes, style=f"--strength:{strength:.2f}")


def samples(report: Report) -> Markup:
    """Some held-out images, the misread ones first."""
    if not report.samples:
        return section("samples", "Some of the images", "No images were kept.")
    ordered = sorted(report.samples, key=lambda sample: sample.right)
    wrong = sum(not sample.right for sample in ordered)
    lead = f"{quantity(len(ordered), 'held-out image')} as the plain form reads them, " + (
        f"{quantity(wrong, 'misread one')} first." if wrong else "all of them right."
    )
    tiles = element("ul", (_tile(sample, report.data.classes) for sample in ordered), class_="samples")
    return section("samples", "Some of the images", lead, tiles)


def _tile(sample: Sample, classes: Sequence[str]) -> Markup:
    predicted, truth = classes[sample.predicted], classes[sample.truth]
    size = {"width": len(sample.pixels[0]), "height": len(sample.pixels)}
    image = element("img", src=data_uri(sample.pixels), alt=f"held-out image of class {truth}", **size)
    outcome = verdict(sample.right, predicted, f"{predicted}, truth {truth}")
    caption = join(outcome, element("small", percentage(sample.confidence)))
    return element("li", image, element("p", caption), class_="sample" if sample.right else "sample wrong")
