import pytest

from repvgg.studies.report import formatting


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
        (formatting.relative_change(5, 5), "unchanged"),
        (formatting.quantity(1, "epoch"), "1 epoch"),
        (formatting.quantity(3, "branch", "branches"), "3 branches"),
        (formatting.timestamp("2026-08-03T14:05:00"), "3 August 2026, 14:05"),
        (formatting.timestamp("yesterday"), "yesterday"),
        (formatting.multiplication_signs("3x3 conv, 1x1, max"), "3×3 conv, 1×1, max"),
    ],
)
def test_numbers_are_formatted_for_people(shown, expected):
    assert " ".join(shown.split()) == expected
