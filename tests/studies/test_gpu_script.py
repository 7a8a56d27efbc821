"""benchmarks/gpu.py without a GPU: its steps, and the file from which a later call continues."""

import shutil
from argparse import Namespace

from benchmarks import gpu
from repvgg.studies import find_study
from repvgg.studies.base import flatten
from repvgg.studies.store import CellStore, Header
from tests.studies.helpers import SECONDS


def arguments(tmp_path, **chosen):
    given = {"device": "cuda", "tiny": False, "data": "imagefolder:x", "seeds": 3, "jobs": 4, "tables": False}
    return Namespace(**(given | {"out": tmp_path, "studies": tmp_path / "studies"} | chosen))


def test_steps_have_the_sizes_of_the_paper_and_the_most_valuable_are_first(tmp_path):
    steps = gpu.all_steps(arguments(tmp_path))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[0] == "networks-float32"
    resolved = {
        step.name: flatten(find_study(step.study).resolve(step.settings))
        for step in steps
        if step.study not in ("table6", "table7")
    }
    assert {resolved[name]["batch"] for name in resolved if name.startswith("networks")} == {128}
    assert (resolved["table1-tf32"]["batch"], resolved["table1-tf32"]["channels"]) == (32, 2048)
    for dtype in ("float32", "tf32", "float16", "bfloat16"):
        for study in ("networks", "table1", "table6-speed", "figure3"):
            assert resolved[f"{study}-{dtype}"]["dtype"] == dtype
    assert resolved["networks-float16-compiled"]["compile"]
    trained = next(step for step in steps if step.name == "table6").settings.config
    assert (trained.epochs, trained.batch_size, trained.recipe) == (30, 128, "cifar-paper")


def test_results_restore_the_cells_and_make_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "write_chart", lambda folder, chart: None)  # drawing would be most of the time
    args = arguments(tmp_path)
    steps = gpu.all_steps(args)
    store = CellStore(args.studies / "networks-float32", Header("figure1", {}, {"gpu": "a GPU"}, started="now"), {})
    store.put("plan", {"groups": [list(SECONDS)]})
    store.put("round-00-0000", {"seconds": SECONDS})
    gpu.save(args.studies, args.out)
    shutil.rmtree(args.studies)
    gpu.restore(args.studies, args.out)
    report = gpu.report(steps, args.studies, args.out)
    assert "| RepVGG-A2 | ResNet-50 | float32 | torch | torch | 1.84 | 1.84 | 1.84 | 1.84 | holds |" in report
    assert "gpu a GPU; not finished" in report
    assert not gpu.is_finished(args.studies / "networks-float32")
