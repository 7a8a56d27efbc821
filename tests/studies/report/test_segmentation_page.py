"""The page of a segmentation, from numbers and samples."""

import re

import numpy as np
import pytest

from repvgg.studies.report import segmentation_page
from repvgg.studies.report.schema import Epoch
from repvgg.studies.report.segmentation_page import SegmentationPage, epochs_of
from repvgg.training.samples import Sample, read_samples, write_samples

PALETTE = ((0, 0, 0), (128, 0, 0), (0, 128, 0))
RESULT = {
    "miou": 0.625,
    "mean_accuracy": 0.7,
    "pixel_accuracy": 0.75,
    "iou": [0.75, 0.5, None],
    "accuracy": [0.9, 0.5, None],
    "absent_classes": "ignore",
    "correct": 75,
    "pixels": 100,
    "images": 2,
    "confusion": [[70, 5, 0], [20, 5, 0], [0, 0, 0]],
}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(segmentation_page, "environment", lambda: {"cpu": "a CPU", "threads": "2"})


def sample():
    mask = np.zeros((9, 12), np.uint8)
    mask[:4] = 1
    truth = mask.copy()
    truth[0], truth[8] = 255, 1
    return Sample(np.full((9, 12, 3), 120, np.uint8), truth, mask)


def page(**changes):
    settings = {
        "name": "pspnet_tiny",
        "headline": "Evaluated on the street.",
        "created": "2026-11-30T10:00:00+00:00",
        "command": "repvgg eval",
        "classes": ("road", "<b>car</b>", "sky"),
        "palette": PALETTE,
        "forms": {"plain form": RESULT},
        "samples": [sample()],
    }
    return SegmentationPage(**settings | changes).render()


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<(style|svg).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL))


def test_what_it_says():
    html = page(agreement=(99, 100))
    text = text_of(html)
    for words in ("62.5%", "75.0% of 100 pixels", "differ in 1 of 100 pixels", "1 of 3", "left out of the means"):
        assert words in text
    assert "road (80.0%)" in text  # what cars are most often taken for: 20 of 25 pixels
    assert "<b>car" not in html
    assert "sky: absent" in html  # in the description of the chart
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "Learning curves" not in text
    assert "87.5% right" in text  # of 96 pixels with truth, 12 in the last row are wrong


def test_learning_curves_of_a_run():
    history = (Epoch(1, 2.0, 0.2, 2.2), Epoch(2, 1.0, 0.5, 1.4))
    text = text_of(page(history=history, seconds=65.0))
    assert "Learning curves" in text
    assert "Validation mIoU by epoch 50.0%" in text
    assert epochs_of([{"epoch": 1, "loss": 2, "held_out_miou": float("nan")}])[0].accuracy == 0


def test_large_matrices_are_not_drawn():
    count = 41
    result = {
        **RESULT,
        "iou": [0.5] * count,
        "accuracy": [0.5] * count,
        "confusion": np.eye(count, dtype=int).tolist(),
    }
    names = tuple(f"class {index}" for index in range(count))
    text = text_of(page(classes=names, palette=[(0, 0, 0)] * count, forms={"model": result}, samples=[]))
    assert "more than 40 do not fit on a page" in text
    assert "No images were saved" in text


def test_samples_survive_their_files(tmp_path):
    rows = write_samples(tmp_path / "samples", [sample()], PALETTE)
    (again,) = read_samples(tmp_path / "samples", rows)
    for name in ("image", "truth", "prediction"):
        assert np.array_equal(getattr(again, name), getattr(sample(), name))
    (tmp_path / "samples" / rows[0]["truth"]).unlink()
    assert read_samples(tmp_path / "samples", rows) == []
