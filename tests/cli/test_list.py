import json

from repvgg.models import SPECS, list_models


def test_table_has_a_row_a_model(repvgg):
    outcome = repvgg("list")
    assert (outcome.code, outcome.err) == (0, "")
    title, *rows = outcome.out.splitlines()
    assert title.split() == ["model", "input", "params,", "train", "params,", "plain", "GMACs", "Wino", "GMULs"]
    assert [row.split()[0] for row in rows] == list_models()
    assert rows[0].split() == ["repvgg_a0", "224", "9.11", "M", "8.31", "M", "1.361", "0.747"]
    assert {len(row) for row in rows} == {len(title)}
    assert len(title) < 80


def test_json_is_exact(repvgg):
    outcome = repvgg("list", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    rows = {row["name"]: row for row in json.loads(outcome.out)}
    assert list(rows) == list_models()
    assert rows["repvgg_a0"] == {
        "name": "repvgg_a0",
        "input_size": 224,
        "params_train": 9108968,
        "params_plain": 8309384,
        "macs": 1361451008,
        "winograd_muls": 747296768,
        "source": SPECS["repvgg_a0"].source,
    }
