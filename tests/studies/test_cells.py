"""A folder of cells: one by one, continued, never mixed."""

import json

import pytest

from repvgg.errors import DataError, OutputError, OutputExistsError, UsageError
from repvgg.studies.cells import HEADER, Cells, Header, read_header

SETTINGS = {"batch": 8, "dtype": "float32"}
MACHINE = {"cpu": "a processor", "threads": "2", "torch": "2.15.0", "load": "0.50"}


def header(**changes):
    return Header("table4", SETTINGS | changes.pop("settings", {}), MACHINE | changes, command="repvgg study table4")


def test_nothing_is_written_before_the_first_cell(tmp_path):
    cells = Cells.open(tmp_path / "new", header())
    assert len(cells) == 0
    assert not (tmp_path / "new").exists()


def test_cells_are_there_as_soon_as_they_are_put(tmp_path):
    cells = Cells.open(tmp_path / "new", header())
    cells.put("b", {"seconds": 0.5})
    cells.put("a", {"seconds": 1.5})
    again = Cells.open(tmp_path / "new", header(load="9.99"))
    assert again.values == {"a": {"seconds": 1.5}, "b": {"seconds": 0.5}}
    assert list(again.values) == ["a", "b"]
    assert "a" in again
    assert again["a"] == {"seconds": 1.5}
    assert again.header == cells.header, "the stamp of the first start"
    assert again.header.started
    assert not again.header.finished


def test_an_empty_folder_is_free(tmp_path):
    Cells.open(tmp_path, header()).put("a", {})
    assert (tmp_path / HEADER).is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"batch": 16}}, "batch 8, and now it is 16"),
        ({"settings": {"more": None}}, None),
        ({"cpu": "another"}, "cpu 'a processor', and now it is 'another'"),
        ({"threads": "1"}, "threads '2', and now it is '1'"),
        ({"gpu": "a GPU"}, "gpu None, and now it is 'a GPU'"),
    ],
)
def test_cells_of_other_settings_or_machines_are_not_mixed_in(tmp_path, changes, words):
    Cells.open(tmp_path, header()).put("a", {})
    if words is None:
        assert Cells.open(tmp_path, header(**changes)).values == {"a": {}}, "nobody chose it then or now"
        return
    with pytest.raises(UsageError, match=words):
        Cells.open(tmp_path, header(**changes))
    assert len(Cells.open(tmp_path, header(**changes), overwrite=True)) == 0
    assert not (tmp_path / HEADER).exists()


def test_cells_of_another_machine_where_they_hold_no_times(tmp_path):
    Cells.open(tmp_path, header()).put("a", {})
    other = Cells.open(tmp_path, header(cpu="another"), anywhere=True)
    other.put("b", {"x": 1})
    assert other.header.environment["cpu"] == "a processor", "the header is that of the first"
    with pytest.raises(UsageError, match="batch 8, and now it is 16"):
        Cells.open(tmp_path, header(settings={"batch": 16}), anywhere=True)


def test_cells_that_another_process_puts_meanwhile(tmp_path):
    cells = Cells.open(tmp_path, header())
    cells.begin()
    cells.begin()
    assert not cells.look("a")
    Cells.open(tmp_path, header()).put("a", {"x": 1})
    assert "a" not in cells
    assert cells.look("a")
    assert cells["a"] == {"x": 1}
    Cells.open(tmp_path, header()).put("c", {"x": 2})
    cells.look_at_all()
    assert cells.values == {"a": {"x": 1}, "c": {"x": 2}}
    (tmp_path / "cells" / "b.json").write_text("[")
    with pytest.raises(DataError, match=r"b\.json"):
        cells.look("b")


def test_another_study_is_not_mixed_in(tmp_path):
    Cells.open(tmp_path, header()).put("a", {})
    with pytest.raises(UsageError, match="study 'table4', and now it is 'table5'"):
        Cells.open(tmp_path, Header("table5", SETTINGS, MACHINE))


def test_a_finished_study_is_left_alone_unless_asked(tmp_path):
    cells = Cells.open(tmp_path, header())
    cells.put("a", {})
    cells.finish()
    assert read_header(tmp_path).finished
    with pytest.raises(OutputExistsError, match="finished study"):
        Cells.open(tmp_path, header())
    assert len(Cells.open(tmp_path, header(), overwrite=True)) == 0


def test_a_folder_of_something_else_is_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="something else than a study"):
            Cells.open(tmp_path, header(), overwrite=overwrite)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError):
        Cells.open(tmp_path / "file", header(), overwrite=True)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_cells_that_cannot_be_read_are_named(tmp_path, text):
    cells = Cells.open(tmp_path, header())
    cells.put("a", {})
    (tmp_path / "cells" / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json.*remove it"):
        Cells.open(tmp_path, header())
    (tmp_path / HEADER).write_text(json.dumps({"strange": 1}))
    with pytest.raises(DataError, match="not the header of a study"):
        Cells.open(tmp_path, header())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Cells.open(tmp_path / "file" / "below", header()).put("a", {})
