"""The page of a training run, from what is in its folder."""

import json
import re

import pytest

from repvgg.studies.report import run_page

FORM = {"top1": 0.9, "top5": 1.0, "macro_accuracy": 0.89, "correct": 54, "images": 60}
CONFUSION = [[18, 2, 0], [1, 19, 0], [0, 3, 17]]


def epoch(number, **more):
    return {"epoch": number, "loss": 2.0 / number, "held_out_accuracy": 1 - 0.5 / number, **more}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return a function that writes report.json and returns the page."""
    monkeypatch.setattr(run_page, "environment", lambda: {"cpu": "a CPU", "threads": "2"})

    def write(**changed):
        report = {
            "created": "2026-11-30T10:00:00+00:00",
            "command": "repvgg train --recipe cifar",
            "config": {"model": "repvgg_t0", "recipe": "cifar", "init": None, "data": {"uri": "imagefolder:<photos>"}},
            "classes": ["cat", "dog", "<i>bird</i>"],
            "train_form": {**FORM, "confusion": CONFUSION},
            "plain_form": {**FORM, "confusion": CONFUSION},
            "evidence": {"relative": 3.1e-7, "tolerance": 3.8e-6},
            "seconds": 93.2,
            "history": [epoch(number, held_out_loss=2.5 / number) for number in (1, 2, 3)],
            "skipped_images": 0,
            **changed,
        }
        (tmp_path / "report.json").write_text(json.dumps(report))
        (tmp_path / "log.csv").write_text("epoch")
        return run_page.write_run_page(tmp_path).read_text(encoding="utf-8")

    return write


def test_what_it_says(page):
    html = page()
    text = re.sub(r"\s+", " ", re.sub(r"<(style|svg).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL))
    for words in (
        "90.0% of 60 validation images",
        "93.2 s",
        "repvgg train --recipe cifar",
        "3.1 × 10⁻⁷",
    ):
        assert words in text
    assert "dog (2)" in text  # what cats are most often taken for
    assert "training (solid), validation (dashed)" in text
    assert "train form" in text
    assert 'href="./log.csv"' in html
    assert "<i>bird" not in html
    assert "&lt;photos&gt;" in html
    assert "http" not in re.sub(r"xmlns[:=\w]*\"[^\"]*\"", "", html).replace("http://www.w3.org", "")


def test_models_without_a_plain_form_and_older_runs(page):
    html = page(plain_form=None, evidence=None, history=[epoch(1), epoch(2, held_out_loss="NaN")])
    assert "plain form" not in html.lower().split("files of this run")[0].split("</style>")[1]
    assert "dashed" not in html.split("</style>")[1]


def test_many_classes(page):
    names = [f"class {number}" for number in range(60)]
    confusion = [[10 if row == column else 0 for column in range(60)] for row in range(60)]
    confusion[7][7], confusion[7][8] = 1, 9
    html = page(classes=names, train_form={**FORM, "confusion": confusion}, plain_form=None)
    rows = re.findall(r'<th scope="row">(class \d+)</th>', html)
    assert (len(rows), rows[0]) == (50, "class 7")
    assert "class 8 (9)" in html
