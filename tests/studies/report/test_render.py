import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from repvgg import errors
from repvgg.errors import MissingDependencyError
from repvgg.studies.report import render
from repvgg.studies.report.render import branch_kind, png_data_uri, render_quickstart
from repvgg.studies.report.schema import File, NextCommand, Report

VOID = {"br", "col", "hr", "img", "link", "meta", "wbr"}
SECTIONS = ["figures", "network", "learning", "equality", "speed", "confusion", "samples", "folder", "next"]
HOSTILE = "<script>alert(1)</script>\"'&amp;\x00"


class Page(HTMLParser):
    """Check nesting while parsing; collect tags with attributes, and the text outside the style sheet."""

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
        raise AssertionError(f"<{tag}/> is not HTML")

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
    return Page(render_quickstart(report))


def with_plain_speed(report, speedup, low, high):
    slow = replace(report.timing("plain"), speedup=speedup, speedup_q1=low, speedup_q3=high)
    return replace(report, timings=(*report.timings[:2], slow))


def test_page_is_one_document_with_balanced_tags(report, page):
    assert render_quickstart(report).startswith("<!doctype html>\n<html lang=")
    assert [len(page.named(tag)) for tag in ("html", "head", "body", "main", "h1")] == [1] * 5


def test_the_same_report_gives_the_same_page(report):
    assert render_quickstart(report) == render_quickstart(Report.from_dict(report.to_dict()))


def test_page_loads_nothing(report, page):
    html = render_quickstart(report)
    assert not re.search(r"https?:|@import|url\((?!#)|<script|<link|<iframe|<object", html)
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.named("img"))
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()


def test_ids_are_unique_and_labels_point_at_them(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    labels = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert len(ids) == len(set(ids))
    assert set(labels) <= set(ids)
    assert labels


def test_charts_and_images_are_described(page):
    described = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(described) > 20
    assert all(attributes["aria-label"] for attributes in described)
    hidden = [attributes for attributes in page.named("svg") if attributes.get("aria-hidden") == "true"]
    assert all(attributes in described or attributes in hidden for attributes in page.named("svg"))
    assert [attributes["alt"] for attributes in page.named("img")] == [
        "validation image of class 8",
        "validation image of class 4",
    ]
    assert len(page.named("caption")) == len(page.named("table")) == 5
    assert all(attributes["scope"] in ("row", "col") for attributes in page.named("th"))


def test_each_chart_has_a_wide_and_a_narrow_variant(page):
    charts = [attributes for attributes in page.named("svg") if attributes.get("role") == "img"]
    assert [attributes["class"] for attributes in charts] == ["wide", "narrow"] * 4
    labels = [attributes["aria-label"] for attributes in charts]
    assert labels[::2] == labels[1::2]
    assert labels[0] == "Training loss: 1.9 after epoch 1, 0.042 after epoch 3"
    assert labels[2] == "Validation accuracy: 62.0% after epoch 1, 95.0% after epoch 3"
    assert "plain form on 20 validation images: error 2.9" in labels[4]
    assert labels[6].startswith("Time per batch. train form: median 9.62\u00a0ms; ")


def test_order_of_the_sections(page):
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
        "20 images never trained on, 1 misclassified",
        "2.9 × 10⁻⁷",
        "41 times below the tolerance of 1.2 × 10⁻⁵",
        "20/20",
        "10.6% fewer after the collapse",
        "from 203,050",
        "17 branches on the left became 7 convolutions on the right",
        "16 → 32 channels, stride 2",
        "13.4 → 11.9 million multiply-adds",
        "a linear classifier",
        "3 epochs over 1,437 training images took 13.2 s",
        "train form itself: 2.7 × 10⁻⁷",
        "100 roundings of float32",
        "9.33 ms – 10.0 ms",
        "1.92×",
        "19 of 20 validation images are on the diagonal, 1 off it",
        "1, truth 8",
        "61.3%",
        "1.1 MB",
        "See all models.",
        "repvgg quickstart --seed 7",
        "python 3.11.2",
    ],
)
def test_measurements_are_shown(page, shown):
    assert shown in page.text


def test_each_block_is_drawn_with_its_branches(report, page):
    branches = [branch for region in report.regions for branch in region.branches]
    boxes = [
        len([box for box in page.of_class(kind) if "box" in box["class"]]) for kind in ("wide", "point", "straight")
    ]
    assert boxes == [sum(branch.startswith(start) for branch in branches) for start in ("3x3", "1x1", "identity")]
    assert len(page.of_class("sum")) == len(report.regions)
    described = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert sum("plain form: one 3×3 convolution" in words for words in described) == 7


def test_error_bars_grow_with_the_logarithm(report, page):
    bars = [bar["style"] for bar in page.of_class("arriving") if "style" in bar]
    widths = [float(style.removeprefix("width:").rstrip("%")) for style in bars]
    expected = [50 * (math.log10(region.error_arriving) + 8) for region in report.regions]
    assert widths == pytest.approx(expected, abs=0.01)


def test_many_blocks_and_many_branches_fit(long_report):
    many = replace(long_report.regions[3], branches=("3x3 conv + BN",) * 9)
    single = replace(long_report.regions[4], branches=("3x3 conv + BN",))
    regions = (*long_report.regions[:3], many, single, *long_report.regions[5:])
    page = Page(render_quickstart(replace(long_report, regions=regions)))
    assert sum(".conv, train form: " in attributes.get("aria-label", "") for _, attributes in page.tags) == 28
    assert len(page.of_class("sum")) == 27
    assert len([box for box in page.of_class("more") if "box" in box["class"]]) == 1
    assert "+4 more" in page.text


def test_a_slower_plain_form_is_called_slower(report, page):
    sentence = "The plain form is not faster than the train form here: 0.94× (interquartile range 0.90–0.97×)."
    slow = Page(render_quickstart(with_plain_speed(report, 0.94, 0.9, 0.97))).text
    assert re.sub(r"\s+([.])", r"\1", slow).count(sentence) == 1
    assert "computes the same function (20 of 20 predictions agree) and is not faster (0.94×)" in slow
    assert "not faster" not in page.text


def test_a_spread_across_one_is_not_called_faster(report):
    text = Page(render_quickstart(with_plain_speed(report, 1.02, 0.97, 1.06))).text
    assert "The plain form is not clearly faster than the train form here" in text
    assert "is not clearly faster (1.02×)" in text


def test_a_failed_check_fails_the_page(report, page):
    failed = replace(report.evidence[0], passed=False, relative_error=0.032, agree=15, reason="the error is too large")
    broken = Page(render_quickstart(replace(report, evidence=(failed, *report.evidence[1:]))))
    assert "Not equal: 1 of 3 checks failed" in broken.text
    assert "1 of 3 checks failed: do not use what failed" in broken.text
    assert "the error is too large" in broken.text
    assert "verified to be equal" not in broken.text
    assert [len(document.of_class("badge")) for document in (broken, page)] == [1, 1]
    assert [document.of_class("badge")[0]["class"] for document in (broken, page)] == ["badge bad", "badge good"]
    assert len(broken.of_class("bad")) > len(page.of_class("bad"))


def test_nan_and_infinity_are_named(report):
    nan = replace(report.evidence[0], passed=False, relative_error=math.nan, absolute_error=math.inf)
    text = Page(render_quickstart(replace(report, evidence=(nan,)))).text
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
    text = Page(render_quickstart(replace(report, training=training, environment={}, **nothing))).text
    for sentence in (
        "Nothing was collapsed",
        "No history",
        "Nothing was verified",
        "Nothing was timed",
        "No images",
        "Not verified",
    ):
        assert sentence in text
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
    html = render_quickstart(hostile)
    page = Page(html)
    assert "<script" not in html
    assert "\x00" not in html
    assert page.named("script") == page.named("b") == []
    assert page.text.count("<script>alert(1)</script>\"'&amp;\ufffd") > 10
    assert page.named("a")[0]["href"] == "./javascript%3Aalert%281%29//%3Cb%3E"


def test_misclassified_images_come_first(page):
    tiles = page.of_class("sample")
    assert [tile["class"] for tile in tiles] == ["sample wrong", "sample"]


def test_the_confusion_matrix_shows_every_count(page):
    right = [cell for cell in page.of_class("right") if "style" in cell]
    wrong = [cell for cell in page.of_class("wrong") if "style" in cell]
    assert (len(right), len(wrong), len(page.of_class("none"))) == (10, 1, 89)


def test_png_holds_the_pixels():
    pixels = [[0, 128, 255], [7, 8, 9]]
    raw = base64.b64decode(png_data_uri(pixels).removeprefix("data:image/png;base64,"), validate=True)
    with Image.open(BytesIO(raw)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (3, 2))
        assert image.tobytes() == bytes([0, 128, 255, 7, 8, 9])


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        ("3x3 conv + BN", "wide"),
        ("1x3 conv + BN", "wide"),
        ("11 x 11 conv", "wide"),
        ("1x1 conv + BN", "point"),
        ("1×1 conv", "point"),
        ("Identity + BN", "straight"),
        ("average pool", "wide"),
        ("+4 more", "more"),
    ],
)
def test_kinds_of_branches(branch, expected):
    assert branch_kind(branch) == expected


def test_a_missing_package_is_named_with_its_extra(report, monkeypatch):
    def missing(name, *_):
        raise ImportError(name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    render._environment.cache_clear()
    with pytest.raises(
        MissingDependencyError, match=r"needs 'jinja2', which is not installed: pip install 'repvgg\[study\]'"
    ):
        render._environment()
