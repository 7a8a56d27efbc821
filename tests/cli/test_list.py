import json

from repvgg.cli import list_models as list_models_module
from repvgg.errors import MissingDependencyError
from repvgg.models import PSPNETS, SPECS, list_models, list_segmentation_models


def test_table_has_a_row_a_model(repvgg):
    outcome = repvgg("list")
    assert (outcome.code, outcome.err) == (0, "")
    classifiers, _, segmentation = outcome.out.partition("\n\n")
    title, *rows = classifiers.splitlines()
    assert title.split() == ["model", "input", "params,", "train", "params,", "plain", "GMACs", "Wino", "GMULs"]
    assert [row.split()[0] for row in rows] == list_models()
    assert rows[0].split() == ["repvgg_a0", "224", "9.11", "M", "8.31", "M", "1.361", "0.747"]
    assert {len(row) for row in rows} == {len(title)}
    assert len(title) < 80
    title, *rows = segmentation.splitlines()
    assert title.split("  ")[0] == "segmentation model"
    assert [row.split()[0] for row in rows] == list_segmentation_models()
    assert rows[0].split() == ["pspnet_repvgg_a0", "713", "8", "21.72", "M", "20.47", "M", "153.7"]
    assert len(title) < 80


def test_json_is_exact(repvgg):
    outcome = repvgg("list", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    rows = {row["name"]: row for row in json.loads(outcome.out)}
    assert list(rows) == [*list_models(), *list_segmentation_models()]
    assert rows["repvgg_a0"] == {
        "name": "repvgg_a0",
        "input_size": 224,
        "params_train": 9108968,
        "params_plain": 8309384,
        "macs": 1361451008,
        "winograd_muls": 747296768,
        "source": SPECS["repvgg_a0"].source,
    }
    assert rows["pspnet_small_repvgg_a0"] == {
        "name": "pspnet_small_repvgg_a0",
        "input_size": 241,
        "output_stride": 16,
        "params_train": 15820326,
        "params_plain": 14571443,  # 7028384 + 4 (1280·320 + 320) + (2560·256·9 + 256) + (256·19 + 19)
        "macs": 3696797712,
        "winograd_muls": 2068805392,
        "source": PSPNETS["pspnet_small_repvgg_a0"].source,
    }


def test_without_torchvision_the_others_are_listed(repvgg, monkeypatch):
    def missing(name):
        if "resnet" in name:
            raise MissingDependencyError("torchvision is not installed.")
        return numbers | {"input_size": 1, "output_stride": 8, "name": name}

    numbers = {"params_train": 1, "params_plain": 1, "macs": 1, "winograd_muls": 1}
    monkeypatch.setattr(list_models_module, "_describe", lambda name: numbers | {"input_size": 1, "name": name})
    monkeypatch.setattr(list_models_module, "_describe_segmentation", missing)
    outcome = repvgg("list")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith("not counted, because torchvision is not installed: pspnet_resnet18")
