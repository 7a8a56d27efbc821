import base64
import struct
import zlib

import pytest

from repvgg.studies.report import formatting
from repvgg.studies.report.drawing import kind
from repvgg.studies.report.markup import Markup, element, join
from repvgg.studies.report.png import data_uri
from repvgg.studies.report.svg import LinearAxis, LogAxis, text


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", 'a < "b"')
    assert inner == "<b>a &lt; &quot;b&quot;</b>"
    assert element("p", inner, " & ", None, class_='x"y', aria_label="é") == (
        '<p class="x&quot;y" aria-label="é"><b>a &lt; &quot;b&quot;</b> &amp; </p>'
    )
    assert isinstance(join("<"), Markup)


def test_void_elements_have_no_end_and_none_leaves_an_attribute_out():
    assert element("img", src="x", width=2.50, alt=None) == '<img src="x" width="2.5">'


def test_a_generator_of_markup_is_joined():
    assert element("ul", (element("li", str(index)) for index in range(2))) == "<ul><li>0</li><li>1</li></ul>"


def test_png_holds_the_pixels():
    pixels = [[0, 128, 255], [7, 8, 9]]
    raw = base64.b64decode(data_uri(pixels).removeprefix("data:image/png;base64,"), validate=True)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        name, body = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length]) == (zlib.crc32(name + body),)
        chunks[name], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 0, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == b"\0\x00\x80\xff\0\x07\x08\x09"


@pytest.mark.parametrize(
    ("values", "axis"),
    [
        ([3e-7, 2e-5, None], LogAxis(-7, -4)),
        ([1e-6], LogAxis(-8, -6)),
        ([0.0, float("inf"), float("nan")], LogAxis(-2, 0)),
        ([], LogAxis(-2, 0)),
    ],
)
def test_a_log_axis_holds_whole_decades(values, axis):
    assert LogAxis.around(values) == axis


def test_positions_on_axes():
    axis = LogAxis(-8, -4)
    expected = {1e-8: 0, 1e-6: 50, 1e-4: 100, 1.0: 100, 1e-20: 0, 0.0: 0, float("nan"): 100, float("inf"): 100}
    assert {value: axis.position(value) for value in expected} == pytest.approx(expected, nan_ok=True)
    assert [LinearAxis(0.5, 1.0).position(value) for value in (0.2, 0.5, 0.75, 1.0, 3.0)] == [0, 0, 50, 100, 100]
    assert LinearAxis(1.0, 1.0).position(1.0) == 0
    assert len(LogAxis(-16, 0).ticks(6)) <= 6


def test_text_is_cut_or_squeezed_to_its_room():
    assert "textLength" not in text(0, 0, "3×3 conv", "label", room=90)
    assert 'textLength="90"' in text(0, 0, "3×3 conv + BN + x", "label", room=90)
    assert "…</text>" in text(0, 0, "a" * 40, "label", room=90)


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
def test_branches_are_told_apart(branch, expected):
    assert kind(branch) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formatting.scientific(3.14e-7), "3.1 × 10⁻⁷"),
        (formatting.scientific(0.0), "0"),
        (formatting.scientific(None), "–"),
        (formatting.percentage(0.99722), "99.7%"),
        (formatting.percentage(0.99996), "99.996%"),
        (formatting.percentage(1.0), "100%"),
        (formatting.percentage(0.0), "0%"),
        (formatting.duration(4.2e-5), "42.0 µs"),
        (formatting.duration(9.996e-3), "10.0 ms"),
        (formatting.duration(0.1234), "123 ms"),
        (formatting.duration(200.9), "3 min 20 s"),
        (formatting.file_size(999), "999 B"),
        (formatting.file_size(61_204), "61 kB"),
        (formatting.file_size(1_074_816), "1.1 MB"),
        (formatting.relative_change(100, 90), "10.0% fewer"),
        (formatting.relative_change(100, 101), "1.0% more"),
        (formatting.relative_change(5, 5), "as many"),
        (formatting.quantity(1, "epoch"), "1 epoch"),
        (formatting.quantity(3, "branch", "branches"), "3 branches"),
        (formatting.timestamp("2026-08-03T14:05:00"), "3 August 2026, 14:05"),
        (formatting.timestamp("yesterday"), "yesterday"),
        (formatting.multiplication_signs("3x3 conv, 1x1, max"), "3×3 conv, 1×1, max"),
    ],
)
def test_numbers_are_written_as_people_write_them(shown, expected):
    assert " ".join(shown.split()) == expected
