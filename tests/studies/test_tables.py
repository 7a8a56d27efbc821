import csv
import io
import json

import pytest

from repvgg.studies.tables import Column, Table, as_csv, as_data, as_markdown

TABLE = Table(
    "speed",
    "Speed",
    (Column("model", "Model"), Column("speed", "Images/s", 1), Column("best", "best"), Column("rounds", "Rounds")),
    (("A|B", 1234.56, True, 30), ("C, D", None, False, None), ("E", "out of memory", None, 3)),
    ("A note.",),
)


def test_markdown_formats_values():
    assert as_markdown(TABLE).splitlines() == [
        "## Speed",
        "",
        "| Model | Images/s | best | Rounds |",
        "| --- | ---: | ---: | ---: |",
        "| A\\|B | 1,234.6 | ✓ | 30 |",
        "| C, D | – |  | – |",
        "| E | out of memory | – | 3 |",
        "",
        "A note.",
    ]


def test_csv_has_unrounded_values():
    rows = list(csv.DictReader(io.StringIO(as_csv(TABLE))))
    assert rows[0] == {"model": "A|B", "speed": "1234.56", "best": "True", "rounds": "30"}
    assert rows[1]["model"] == "C, D"
    assert rows[1]["speed"] == ""


def test_json_has_rows_by_column_key():
    data = json.loads(json.dumps(as_data(TABLE), allow_nan=False))
    assert data["rows"][0]["speed"] == 1234.56
    assert data["rows"][1]["speed"] is None
    assert data["notes"] == ["A note."]


def test_row_of_the_wrong_length_is_refused():
    with pytest.raises(AssertionError):
        Table("t", "T", TABLE.columns, (("one", 2.0),))
