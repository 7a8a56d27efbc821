"""Notes next to exports of formats without metadata: written, read, and refused where they are no notes."""

import pytest

from repvgg.deploy.notes import json_beside, names_note, read_notes, take_names, write_notes
from repvgg.errors import ExportError


def test_notes_and_names_are_read_as_written(tmp_path):
    path = tmp_path / "model.pte"
    write_notes(json_beside(path), path.name, {"mean": "0.5", **names_note(inputs=["image"], shape=[1, 3, 8, 8])})
    notes = read_notes(json_beside(path))
    assert take_names(notes, path) == {"inputs": ["image"], "shape": [1, 3, 8, 8]}
    assert notes == {"mean": "0.5"}
    assert take_names(notes, path) == {}


@pytest.mark.parametrize("text", ["{", "3", "null", "[1, 2]"])
def test_names_of_another_form_are_refused(tmp_path, text):
    with pytest.raises(ExportError, match="export the model again"):
        take_names({**dict.fromkeys(names_note(), text)}, tmp_path / "model.pte")
