"""The top of the page: what was done, the verdict, and the key figures."""

from __future__ import annotations

from repvgg.studies.report.formatting import integer, percentage, ratio, relative_change, scientific, timestamp
from repvgg.studies.report.layout import verdict
from repvgg.studies.report.markup import Child, Markup, element, join
from repvgg.studies.report.schema import Judgement, Report, Timing

_STAMP = ("cpu", "torch", "threads")


def header(report: Report) -> Markup:
    """One sentence on what was done, the verdict, the date and the machine."""
    stamp = [timestamp(report.created), *_stamp(report.environment)]
    return element(
        "header",
        element("p", join("repvgg", element("span", " / "), report.model.name), class_="eyebrow"),
        element("h1", _headline(report)),
        element("p", _sentence(report), class_="sentence"),
        element("p", badge(report), class_="badges"),
        element("ul", (element("li", entry) for entry in stamp), class_="stamp", aria_label="When and where"),
    )


def badge(report: Report) -> Markup:
    """The verdict of all judgements together."""
    judged = len(report.evidence)
    if not judged:
        return element("span", "Not judged: nothing was compared", class_="badge bad")
    failed = sum(not judgement.passed for judgement in report.evidence)
    good = "Equal within tolerance: " + ("the check passed" if judged == 1 else f"all {judged} checks passed")
    return verdict(report.passed, good, f"Not equal: {failed} of {judged} checks failed", "badge")


def _headline(report: Report) -> str:
    outcome = "shown to be equal" if report.passed else "not equal" if report.evidence else "not judged"
    return f"Trained with branches, collapsed to plain convolutions, {outcome}."


def _sentence(report: Report) -> Markup:
    """The whole run in one sentence."""
    data = report.data
    return join(
        element("strong", report.model.name),
        f" learned {data.name} and names {percentage(report.training.accuracy)} of {integer(data.held_out_count)} held-out "
        f"images right; {_folding(len(report.regions))} {_equality(report)} and {_speed(report.timing('plain'))}.",
    )


def _folding(blocks: int) -> str:
    if not blocks:
        return "there was nothing in it to fold. The plain form"
    whole = "its one block" if blocks == 1 else f"each of its {blocks} blocks"
    return f"{whole} was then folded into a single convolution, which"


def _equality(report: Report) -> str:
    if not report.evidence:
        return "nobody has compared with the original yet"
    if not report.passed:
        return "does not compute the same function within tolerance"
    first = report.evidence[0]
    answers = f" ({first.agree} of {first.total} predictions agree)" if first.agree is not None else ""
    return f"computes the same function{answers}"


def _speed(plain: Timing | None) -> str:
    if plain is None:
        return "was not timed"
    if plain.speedup_q1 > 1:
        return f"runs {ratio(plain.speedup)} as fast"
    return f"is not {'clearly ' if plain.speedup > 1 else ''}faster ({ratio(plain.speedup)})"


def _stamp(environment: dict[str, str]) -> list[str]:
    found = {key.lower(): value for key, value in environment.items()}
    words = {"torch": "torch {}", "threads": "{} threads"}
    return [words.get(key, "{}").format(found[key]) for key in _STAMP if key in found]


def key_figures(report: Report) -> Markup:
    """The five figures that matter, as cards."""
    cards = (_accuracy(report), _error(report), _agreement(report), _speedup(report), _parameters(report))
    return element(
        "section",
        element("h2", "Key figures", class_="unseen", id="figures-title"),
        element("dl", cards, class_="cards"),
        id="figures",
        aria_labelledby="figures-title",
    )


def _card(title: str, figure: Child, note: Child, bad: bool = False) -> Markup:
    return element(
        "div",
        element("dt", title),
        element("dd", figure, class_="figure"),
        element("dd", note, class_="note"),
        class_="card bad" if bad else "card",
    )


def _accuracy(report: Report) -> Markup:
    missed = sum(map(sum, report.training.confusion)) - sum(
        row[index] for index, row in enumerate(report.training.confusion)
    )
    note = f"{integer(report.data.held_out_count)} images never trained on, {integer(missed)} misread"
    return _card("Held-out accuracy", percentage(report.training.accuracy), note)


def _error(report: Report) -> Markup:
    if not report.evidence:
        return _card("Relative error", "–", "not judged", bad=True)
    first = report.evidence[0]
    return _card("Relative error", scientific(first.relative_error), _margin(first), not first.passed)


def _margin(judgement: Judgement) -> str:
    bound = f"tolerance of {scientific(judgement.tolerance)}"
    if judgement.passed and 0 < 2 * judgement.relative_error < judgement.tolerance:
        return f"{judgement.tolerance / judgement.relative_error:.0f} times below the {bound}"
    return bound


def _agreement(report: Report) -> Markup:
    compared = [judgement for judgement in report.evidence if judgement.agree is not None and judgement.total]
    if not compared:
        return _card("Predictions agreeing", "–", "nothing to predict was compared")
    first = compared[0]
    return _card(
        "Predictions agreeing", f"{first.agree}/{first.total}", f"on {first.inputs}", first.agree != first.total
    )


def _speedup(report: Report) -> Markup:
    plain = report.timing("plain")
    if plain is None:
        return _card("Speed-up", "–", "not timed")
    spread = f"plain against train form; middle half of the rounds {plain.speedup_q1:.2f}–{ratio(plain.speedup_q3)}"
    return _card("Speed-up", ratio(plain.speedup), spread, plain.speedup <= 1)


def _parameters(report: Report) -> Markup:
    model = report.model
    figure = join(integer(model.params_plain), element("small", f" from {integer(model.params_train)}"))
    return _card("Parameters", figure, f"{relative_change(model.params_train, model.params_plain)} after folding")
