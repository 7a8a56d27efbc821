"""Table 8: networks that take the paper's time, and trainings of a second on made-up shapes."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from repvgg.errors import UnsupportedError, UsageError
from repvgg.measure import RunSettings, count
from repvgg.models import PSPNETS, PhaseImages, create_model
from repvgg.studies import base, find_study, segmentation, segmentation_training
from repvgg.studies.base import run_study
from repvgg.studies.paper import TABLE_8
from repvgg.studies.segmentation import Row, SegmentationSettings, build, rows_of
from repvgg.studies.segmentation_training import SmallNetwork, networks_at, resolve_training
from tests.studies.helpers import FakeStopwatch, Tiny, read_rows, run
from tests.training.masks import CLASSES, SPEC, make_masks


def seconds_of(row):
    """What the paper prints; forms that it has not take a second, or two dilated."""
    return 1 / row.printed.images_per_second if row.printed else 0.05 if row.form == "by phases" else 0.02


@pytest.fixture
def quick(monkeypatch):
    stopwatch = FakeStopwatch()
    monkeypatch.setattr(RunSettings, "stopwatch", lambda settings, batch: stopwatch)
    monkeypatch.setattr(segmentation, "build", lambda row: Tiny(seconds_of(row), row.name))
    monkeypatch.setattr(
        segmentation, "_count", lambda row, size: {"params": 15 * 10**5, "macs": 25 * 10**8, "winograd_muls": 10**9}
    )
    monkeypatch.setattr(base, "write_chart", lambda folder, chart: "<svg/>")


def test_table_has_the_paper_columns_next_to_ours(quick, tmp_path):
    result = run("table8", tmp_path / "t", rounds=3, input_size=9)
    assert result.complete
    rows = {row["model"]: row for row in read_rows(tmp_path / "t" / "table8.csv")}
    assert len(rows) == 2 * 5 + 2 * 2
    titles = {"RepVGG-B1g2-fast": 0, "ResNet-50": 1, "RepVGG-B1g2": 2, "RepVGG-B2-fast": 3, "ResNet-101": 4}
    for title, index in {**titles, "RepVGG-B2": 5}.items():
        printed, row = TABLE_8[index], rows[title]
        assert float(row["paper_miou_percent"]) == printed.miou_percent
        assert float(row["paper_pixel_accuracy_percent"]) == printed.pixel_accuracy_percent
        assert float(row["images_per_second"]) == pytest.approx(printed.images_per_second)
        assert float(row["speed_up"]) == pytest.approx(float(row["paper_speed_up"]))
    other = rows["RepVGG-B2, by phases"]
    assert other["paper_miou_percent"] == other["paper_images_per_second"] == ""
    assert [float(other[key]) for key in ("params_millions", "flops_billions", "winograd_muls_billions")] == [
        1.5,
        2.5,
        1,
    ]
    pairs = {(row["model"], row["compared_with"]): row for row in read_rows(tmp_path / "t" / "table8-pairs.csv")}
    # The paper's text: 62 % faster than ResNet-101.
    claim = pairs["RepVGG-B1g2-fast", "ResNet-101"]
    assert float(claim["paper_ratio"]) == pytest.approx(1.62, abs=0.01)
    assert float(claim["ratio"]) == pytest.approx(float(claim["paper_ratio"]))
    assert float(pairs["RepVGG-B2, by phases", "RepVGG-B2"]["ratio"]) == pytest.approx(1 / 4.5 / 0.05)
    assert pairs["RepVGG-B2, by phases", "RepVGG-B2"]["paper_ratio"] == ""
    assert "RepVGG-B2 runs at 0.09 times the speed of undilated layers when dilated" in result.outcome.lead
    page = (tmp_path / "t" / "table8.md").read_text(encoding="utf-8")
    assert "Accuracies are the paper's, on Cityscapes; nothing is trained for this table." in page


def test_other_backbones_have_no_claims_of_the_paper(quick, tmp_path):
    run("table8", tmp_path / "t", rounds=2, input_size=9, backbones=("repvgg_a0",))
    rows = [row["model"] for row in read_rows(tmp_path / "t" / "table8.csv")]
    assert rows[:3] == ["RepVGG-A0, stride 32", "RepVGG-A0, undilated", "RepVGG-A0-fast"]
    pairs = read_rows(tmp_path / "t" / "table8-pairs.csv")
    assert [row["paper_ratio"] for row in pairs] == [""] * 6


def test_backbones_share_rounds_with_the_resnets_if_not_all_fit_in_memory(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "fit_together", lambda *_: False)
    run("table8", tmp_path / "t", rounds=2, input_size=9)
    groups = json.loads((tmp_path / "t" / "cells" / "plan.json").read_text())["groups"]
    assert [len(group) for group in groups] == [9, 9]
    ratios = [row for row in read_rows(tmp_path / "t" / "table8-pairs.csv") if row["paper_ratio"]]
    assert all(float(row["ratio"]) == pytest.approx(float(row["paper_ratio"])) for row in ratios)


def test_forms_are_what_their_names_say():
    forms = {row.form: build(row) for row in rows_of(("repvgg_a0",)) if row.backbone == "repvgg_a0"}
    convs = {form: [p for p in m.modules() if isinstance(p, nn.Conv2d)] for form, m in forms.items()}
    dilated = {form: sum(conv.dilation != (1, 1) for conv in found) for form, found in convs.items()}
    assert dilated == {"stride 32": 0, "undilated": 0, "fast": 5, "normal": 15, "by phases": 0}
    x = torch.randn(1, 3, 49, 41)
    forms["by phases"].load_state_dict(forms["normal"].state_dict(), strict=False)
    with torch.no_grad():
        sizes = {form: tuple(model.backbone.features(x)[-1].shape) for form, model in forms.items()}
    assert sizes == {form: (1, 1280, *((2, 2) if form == "stride 32" else (7, 6))) for form in forms}
    assert any(isinstance(part, PhaseImages) for part in forms["by phases"].modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for model in forms.values() for part in model.modules())


@pytest.mark.parametrize("backbone", ["repvgg_a0", "resnet50"])
def test_by_phases_is_counted_as_it_runs(backbone):
    """The count of the undilated form, on the meta device, against one of the phases themselves."""
    row = Row(backbone, "by phases")
    run_ = count(build(row).to("meta"), (1, 3, 73, 73))
    assert segmentation._count(row, 73) == {
        "params": run_.params,
        "macs": run_.macs,
        "winograd_muls": run_.winograd_muls,
    }
    normal = segmentation._count(replace(row, form="normal"), 73)
    assert normal["macs"] == run_.macs
    assert normal["winograd_muls"] > run_.winograd_muls


def test_settings_that_do_not_fit_are_refused():
    for settings, message in (
        (
            {"backbones": ("repvgg_b3",)},
            "has the backbone 'repvgg_b3': choose one of repvgg_a0",
        ),
        ({"backbones": ("resnet50",)}, "No segmentation network has the backbone 'resnet50'"),
        ({"backbones": ()}, "each once"),
        ({"data": "masks:x"}, "--data is for trainings: add --train"),
        ({"resnet_init": "x"}, "--resnet-init is for trainings"),
        ({"engine": "openvino", "run": RunSettings(dtype="bfloat16")}, "computes in float32 on the CPU"),
        ({"train": True, "engine": "openvino"}, "--engine are for timing: with --train, take --precision"),
        ({"train": True, "run": RunSettings(dtype="bfloat16")}, "take --precision"),
        ({"rounds": 0}, "rounds must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            SegmentationSettings(**settings)


def test_an_engine_that_does_not_take_the_network_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "build", lambda row: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink()).eval())
    with pytest.raises(UnsupportedError, match="Hardshrink"):
        run("table8", tmp_path / "t", input_size=33, engine="repvgg", rounds=2)


# --train:


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return make_masks(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    rows = (
        SmallNetwork("repvgg-a0", "RepVGG-A0", SPEC),
        SmallNetwork("repvgg-a0-exact", "RepVGG-A0, exact", replace(SPEC, dilation="exact")),
    )
    monkeypatch.setattr(segmentation_training, "networks_at", lambda stride: rows)
    monkeypatch.setattr(base, "write_chart", lambda folder, chart: "<svg/>")


def train(folder, uri, **changes):
    settings = {"input_size": 33, "epochs": 2, "batch": 4, "lr": 0.02, "precision": "float32"} | changes
    settings = SegmentationSettings(run=RunSettings(threads=1), train=True, data=uri, **settings)
    return run_study(find_study("table8"), settings, folder, command="again", console=Console(quiet=True))


def test_trainings_over_seeds(uri, tmp_path):
    folder = tmp_path / "t"
    result = train(folder, uri, rows=("repvgg-a0",))
    assert result.complete
    rows = {row["row"]: row for row in read_rows(folder / "table8-training.csv")}
    cells = {
        key: json.loads((folder / "cells" / f"{key}.json").read_text())
        for key in ("repvgg-a0-seed0", "repvgg-a0-seed1")
    }
    here = [100 * cell["trained"]["miou"] for cell in cells.values()]
    row = rows["RepVGG-A0"]
    assert float(row["miou_percent"]) == pytest.approx(sum(here) / 2)
    assert float(row["miou_deviation"]) == pytest.approx(abs(here[0] - here[1]) / 2**0.5)
    assert len({cell["loss"] for cell in cells.values()}) == 2
    assert float(row["difference"]) == 0
    # Train form and plain form: every pixel of the validation images.
    pixels = 2 * 3 * 41 * 36
    assert row["same_pixels"] == f"{pixels:,} of {pixels:,}"
    assert row["deployed_miou_percent"] == row["miou_percent"]
    assert int(row["parameters"]) > int(row["deployed_parameters"])
    for cell in cells.values():
        assert cell["deployed"]["relative_error"] <= cell["deployed"]["tolerance"]
        assert cell["epochs"] == 2
    classes = read_rows(folder / "table8-classes.csv")
    assert [one["class"] for one in classes] == list(CLASSES)
    mean = sum(100 * cell["trained"]["iou"][0] for cell in cells.values()) / 2
    assert float(classes[0]["repvgg_a0"]) == pytest.approx(mean)
    assert result.outcome.lead.startswith("Mean IoU on the validation images, over 2 seeds: RepVGG-A0 ")
    assert not list((folder / "runs").glob("*/last.ckpt"))


def test_an_interrupted_study_continues_with_the_same_bits(uri, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train(whole, uri, seeds=1, rows=("repvgg-a0",))
    from repvgg import training

    fit, left = training.fit, [1]

    def interrupted(*args, on_epoch, **kwargs):
        def stop(history, weights):
            on_epoch(history, weights)
            if len(history) == 2 and left:
                left.pop()
                raise KeyboardInterrupt

        return fit(*args, on_epoch=stop, **kwargs)

    monkeypatch.setattr(training, "fit", interrupted)
    folder = tmp_path / "t"
    assert not train(folder, uri, seeds=1, rows=("repvgg-a0",)).complete
    assert (folder / "runs" / "repvgg-a0-seed0" / "last.ckpt").exists()
    assert not list((folder / "cells").glob("*.json"))
    assert train(folder, uri, seeds=1, rows=("repvgg-a0",)).complete
    before, after = (json.loads((f / "cells" / "repvgg-a0-seed0.json").read_text()) for f in (whole, folder))
    for key in ("trained", "deployed", "loss", "epochs"):
        assert before[key] == after[key]


def test_trainings_that_do_not_fit_are_refused(uri, tmp_path):
    for changes, message in (
        ({"data": None}, r"give images with masks, as in --data masks:PATH\."),
        ({"data": "fake:8x2"}, "'fake:8x2' has no masks"),
        ({"rows": ("repvgg",)}, "The trainings have no row 'repvgg': did you mean repvgg-a0"),
    ):
        with pytest.raises(UsageError, match=message):
            train(tmp_path / "t", changes.pop("data", uri), **changes)
    with pytest.raises(UsageError, match=r"A training crop has a side of 8k \+ 1 pixels, not 32"):
        train(tmp_path / "t", uri, input_size=32)


def test_rows_of_each_stride():
    at_16, at_8 = networks_at(16), networks_at(8)
    assert [row.name for row in at_8] == [
        "repvgg-a0-stride32",
        "repvgg-a0-fast",
        "repvgg-a0",
        "repvgg-a0-exact",
        "resnet18",
    ]
    assert {row.name for row in at_8} - {row.name for row in at_16} == {"repvgg-a0-fast"}
    assert at_16[1].spec == PSPNETS["pspnet_small_repvgg_a0"]
    assert [row.spec.output_stride for row in at_8] == [32, 8, 8, 8, 8]
    for row in at_8:
        create_model(row.spec, 3)


def test_training_starts_from_a_classifier(uri, tmp_path):
    from repvgg.models import describe_model, save

    classifier = create_model("repvgg_t0", 10)
    save(tmp_path / "a.safetensors", classifier, describe_model(classifier, "train"))
    folder = tmp_path / "t"
    train(folder, uri, seeds=1, rows=("repvgg-a0",), init=str(tmp_path / "a.safetensors"), epochs=1)
    cell = json.loads((folder / "cells" / "repvgg-a0-seed0.json").read_text())
    assert "the heads are new" in cell["remarks"][0]
    assert "start from" in (folder / "table8.md").read_text()


def test_the_recipe_decides_what_is_not_given(uri):
    settings = SegmentationSettings(train=True, data=uri, run=RunSettings(threads=1))
    config = resolve_training(settings.training)
    assert (config.epochs, config.batch_size, config.data.train_size, config.optim.head_lr) == (15, 8, 161, 10.0)
    assert config.precision != "auto"
