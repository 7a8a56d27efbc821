import pytest

from repvgg.errors import printable, printable_lines


@pytest.mark.parametrize(
    "text", ["", "a Katze 猫", "naïve → ∞", "\N{FAMILY}", "می\u200cخواهم", "👩\u200d🚀", "C:\\x1b"]
)
def test_readable_text_is_unchanged(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b2J", r"\x9b2J"),  # the same as ESC [ in terminals with 8-bit controls
        ("exe\u202egnp.", r"exe\u202egnp."),
        ("\ud800", r"\ud800"),
        ("\x7f\0", r"\x7f\x00"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_controls_are_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_lines_are_kept():
    assert printable_lines("a\n\x1b\tb\r\n") == "a\n\\x1b\tb\\r\n"
