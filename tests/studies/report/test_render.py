import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from repvgg.studies.report import File, NextCommand, Report, render

VOID = {"br", "col", "hr", "img", "link", "meta", "wbr"}
SECTIONS = ["figures", "network", "learning", "equality", "speed", "confusion", "samples", "folder", "next"]
HOSTILE = "<script>alert(1)</script>\"'&amp;\x00"


class Page(HTMLParser):
    """Checks nesting while it reads; keeps tags with attributes, and the text outside the style sheet."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        raise AssertionError(f"<{tag}/> is no HTML")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def of_class(self, name):
        return [attributes for _, attributes in self.tags if name in attributes.get("class", "").split()]


@pytest.fixture(scope="module")
def page(report):
    return Page(render(report))


def with_plain_speed(report, speedup, low, high):
    slow = replace(report.timing("plain"), speedup=speedup, speedup_q1=low, speedup_q3=high)
    return replace(report, timings=(*report.timings[:2], slow))


def test_it_is_one_document_with_balanced_tags(report, page):
    assert render(report).startswith("<!doctype html>\n<html lang=")
    assert [len(page.named(tag)) for tag in ("html", "head", "body", "main", "h1")] == [1] * 5


def test_the_same_report_gives_the_same_page(report):
    assert render(report) == render(Report.from_dict(report.to_dict()))


def test_it_loads_nothing(report, page):
    html = render(report)
    assert not re.search(r"https?:|@import|url\(|<script|<link|<iframe|<object", html)
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.named("img"))
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()


def test_ids_are_unique_and_labels_point_at_them(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    labels = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert len(ids) == len(set(ids))
    assert set(labels) <= set(ids)
    assert labels


def test_drawings_and_images_are_described(page):
    drawings = [attributes for attributes in page.named("svg") if attributes.get("class") != "stretch"]
    assert len(drawings) > 20
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    assert [attributes["alt"] for attributes in page.named("img")] == [
        "held-out image of class 8",
        "held-out image of class 4",
    ]
    assert len(page.named("caption")) == len(page.named("table")) == 5


def test_sections_stand_in_their_order(page):
    assert [attributes["id"] for attributes in page.named("section")] == SECTIONS
    assert len(page.named("header")) == len(page.named("footer")) == 1


@pytest.mark.parametrize(
    "shown",
    [
        "Equal within tolerance: all 3 checks passed",
        "3 August 2026, 14:05 UTC",
        "some CPU, 2 cores",
        "torch 2.11.0",
        "2 threads",
        "20 images never trained on, 1 misread",
        "2.9 × 10⁻⁷",
        "41 times below the tolerance of 1.2 × 10⁻⁵",
        "20/20",
        "10.6% fewer after folding",
        "from 203,050",
        "17 branches on the left became 7 convolutions on the right",
        "16 → 32 channels, stride 2",
        "13.4 → 11.9 million multiply-adds",
        "a linear classifier",
        "3 epochs over 1,437 training images took 13.2 s",
        "train form's own: 2.7 × 10⁻⁷",
        "100 roundings of float32",
        "9.33 ms – 10.0 ms",
        "1.92×",
        "19 of 20 held-out images lie on the diagonal, 1 beside it",
        "1, truth 8",
        "61.3%",
        "1.1 MB",
        "See all models.",
        "repvgg quickstart --seed 7",
        "python 3.11.2",
    ],
)
def test_what_was_measured_is_shown(page, shown):
    assert shown in page.text


def test_each_block_is_drawn_with_its_branches(report, page):
    branches = [branch for region in report.regions for branch in region.branches]
    boxes = [
        len([box for box in page.of_class(kind) if "box" in box["class"]]) for kind in ("wide", "point", "straight")
    ]
    assert boxes == [sum(branch.startswith(start) for branch in branches) for start in ("3x3", "1x1", "identity")]
    assert len(page.of_class("sum")) == len(report.regions)
    assert sum("plain form: one 3×3 convolution" in svg.get("aria-label", "") for svg in page.named("svg")) == 7


def test_error_bars_grow_with_the_logarithm(report, page):
    widths = [float(bar["width"].rstrip("%")) for bar in page.of_class("arriving") if "width" in bar]
    expected = [50 * (math.log10(region.error_arriving) + 8) for region in report.regions]
    assert widths == pytest.approx(expected, abs=0.01)


def test_the_headline_bars_and_markers_stand_where_the_figures_say(report, page):
    bars = {bar["class"].split()[1]: float(bar["width"].rstrip("%")) for bar in page.of_class("bar")}
    assert bars["plain"] / bars["train"] == pytest.approx(5.02 / 9.62, rel=1e-3)
    errors = [float(dot["cx"].rstrip("%")) for dot in page.of_class("error-dot") if "cx" in dot]
    bounds = [float(line["x1"].rstrip("%")) for line in page.of_class("bound")]
    assert errors[1] < errors[0] == errors[2] < bounds[0]


def test_thirty_blocks_and_many_branches_fit_too(long_report):
    many = replace(long_report.regions[3], branches=("3x3 conv + BN",) * 9)
    single = replace(long_report.regions[4], branches=("3x3 conv + BN",))
    regions = (*long_report.regions[:3], many, single, *long_report.regions[5:])
    page = Page(render(replace(long_report, regions=regions)))
    assert sum(".conv, train form: " in svg.get("aria-label", "") for svg in page.named("svg")) == 28
    assert len(page.of_class("sum")) == 27
    assert len([box for box in page.of_class("more") if "box" in box["class"]]) == 1
    assert "+4 more" in page.text


def test_a_plain_form_that_is_slower_is_called_so(report, page):
    sentence = "The plain form is not faster than the train form here: 0.94× (middle half of the rounds 0.90–0.97×)."
    slow = Page(render(with_plain_speed(report, 0.94, 0.9, 0.97))).text
    assert re.sub(r"\s+([.])", r"\1", slow).count(sentence) == 1
    assert "which computes the same function (20 of 20 predictions agree) and is not faster (0.94×)" in slow
    assert "not faster" not in page.text


def test_a_spread_across_one_is_not_called_faster(report):
    text = Page(render(with_plain_speed(report, 1.02, 0.97, 1.06))).text
    assert "The plain form is not clearly faster than the train form here" in text
    assert "is not clearly faster (1.02×)" in text


def test_a_failed_judgement_fails_the_page(report, page):
    failed = replace(report.evidence[0], passed=False, relative_error=0.032, agree=15, reason="the error is too large")
    broken = Page(render(replace(report, evidence=(failed, *report.evidence[1:]))))
    assert "Not equal: 1 of 3 checks failed" in broken.text
    assert "1 of 3 judgements failed" in broken.text
    assert "the error is too large" in broken.text
    assert "shown to be equal" not in broken.text
    assert [len(document.of_class("badge")) for document in (broken, page)] == [1, 1]
    assert [document.of_class("badge")[0]["class"] for document in (broken, page)] == ["badge bad", "badge good"]
    assert len(broken.of_class("bad")) > len(page.of_class("bad"))


def test_numbers_that_are_none_are_said_to_be_none(report):
    nan = replace(report.evidence[0], passed=False, relative_error=math.nan, absolute_error=math.inf)
    text = Page(render(replace(report, evidence=(nan,)))).text
    assert "not a number" in text
    assert "infinite" in text


def test_a_bare_report_says_what_is_missing(report):
    training = replace(report.training, history=())
    nothing = {
        "regions": (),
        "left": (),
        "evidence": (),
        "timings": (),
        "samples": (),
        "files": (),
        "next_commands": (),
    }
    text = Page(render(replace(report, training=training, environment={}, **nothing))).text
    for said in (
        "Nothing was folded",
        "No history",
        "Nothing was judged",
        "Nothing was timed",
        "No images",
        "Not judged",
    ):
        assert said in text
    assert "Equal within tolerance" not in text


def test_hostile_text_stays_text(report):
    data = replace(report.data, name=HOSTILE, classes=(*"01234567", HOSTILE, "9"))
    regions = (replace(report.regions[0], name=HOSTILE, branches=(HOSTILE, HOSTILE), then=HOSTILE), *report.regions[1:])
    hostile = replace(
        report,
        command=HOSTILE,
        model=replace(report.model, name=HOSTILE),
        data=data,
        regions=regions,
        left=(replace(report.left[0], name=HOSTILE, reason=HOSTILE),),
        evidence=(
            replace(report.evidence[0], subject=HOSTILE, inputs=HOSTILE, tolerance_origin=HOSTILE, reason=HOSTILE),
        ),
        timings=(replace(report.timings[0], name=HOSTILE),),
        files=(File("javascript:alert(1)//<b>", 1, HOSTILE),),
        next_commands=(NextCommand(HOSTILE, HOSTILE),),
        environment={"CPU": HOSTILE, HOSTILE: HOSTILE},
    )
    html = render(hostile)
    page = Page(html)
    assert "<script" not in html
    assert "\x00" not in html
    assert page.named("script") == page.named("b") == []
    assert page.text.count("<script>alert(1)</script>\"'&amp;\ufffd") > 10
    assert page.named("a")[0]["href"] == "./javascript%3Aalert%281%29//%3Cb%3E"


def test_misread_images_come_first_and_carry_a_word(page):
    tiles = page.of_class("sample")
    assert [tile["class"] for tile in tiles] == ["sample wrong", "sample"]


def test_the_confusion_matrix_shows_every_count(page):
    right = [cell for cell in page.of_class("right") if "style" in cell]
    wrong = [cell for cell in page.of_class("wrong") if "style" in cell]
    assert (len(right), len(wrong), len(page.of_class("none"))) == (10, 1, 89)
