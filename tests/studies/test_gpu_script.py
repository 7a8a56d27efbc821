"""benchmarks/gpu.py without a GPU: its steps, and the file from which a later call continues."""

import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest

from benchmarks import gpu
from repvgg.studies import find_study
from repvgg.studies.base import flatten
from repvgg.studies.store import CellStore, Header, as_stored
from repvgg.studies.variants import TABLE_6_VARIANTS
from tests.studies.helpers import SECONDS


def arguments(tmp_path, **chosen):
    given = {"device": "cuda", "tiny": False, "data": "imagefolder:x", "seeds": 3, "jobs": 4, "tables": False}
    return Namespace(**(given | {"out": tmp_path, "studies": tmp_path / "studies"} | chosen))


class Child:
    """Stands in for the process of the steps: ends with a code at once, or runs until it is stopped."""

    def __init__(self, code=None):
        self.pid, self.returncode = 1, code

    def poll(self):
        return self.returncode


@pytest.fixture
def stopped(monkeypatch):
    """Record the processes that are stopped."""
    children = []

    def stop(child):
        child.returncode = -2
        children.append(child)

    monkeypatch.setattr(gpu, "stop", stop)
    return children


def test_an_interruption_stops_the_process_of_the_steps_and_saves(tmp_path, monkeypatch, stopped):
    child, saved = Child(), []
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda *args, **how: child)
    monkeypatch.setattr(gpu, "save", lambda *folders: saved.append(folders))

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.time, "sleep", interrupted)
    args = arguments(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        gpu.supervise(["a", "b"], args, time.monotonic() + 60)
    assert stopped == [child]
    assert saved == [(args.studies, args.out)]


def test_steps_restart_after_the_one_that_crashed_and_not_at_all_if_none_started(tmp_path, monkeypatch, stopped):
    args = arguments(tmp_path)
    args.studies.mkdir()
    (args.studies / gpu.AT_WORK).write_text("a")  # of an earlier call
    commands, at_work = [], iter(["b", None])

    def start(command, **how):
        commands.append(command[command.index("--work") + 2 :])
        if (name := next(at_work)) is not None:
            (args.studies / gpu.AT_WORK).write_text(name)
        return Child(1)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    gpu.supervise(["a", "b", "c", "d"], args, time.monotonic() + 60)
    assert commands == [["a", "b", "c", "d"], ["c", "d"]]
    first, second = (args.out / gpu.ERRORS).read_text().splitlines()
    assert first == "b: its process ended with 1"
    assert "did not start" in second


def test_a_gpu_that_answers_no_more_ends_the_process(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    args.studies.mkdir()

    def fail(*args, **how):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "run_study", fail)
    steps = gpu.all_steps(args)[:2]
    gpu.work(steps, args)  # no GPU was used: the next step runs
    assert len((args.out / gpu.ERRORS).read_text().splitlines()) == 2
    monkeypatch.setattr(gpu.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", fail)
    with pytest.raises(SystemExit, match="CUDA has failed"):
        gpu.work(steps, args)
    assert (args.studies / gpu.AT_WORK).read_text() == steps[0].name


def test_a_process_that_ignores_interruptions_is_killed(monkeypatch):
    monkeypatch.setattr(gpu, "STOP_SECONDS", 0.2)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    with child:
        child.stdout.readline()  # it ignores them from here on
        gpu.stop(child)
        assert child.returncode == -signal.SIGKILL


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
    charts = []
    # Drawing would be most of the time.
    monkeypatch.setattr(gpu, "write_chart", lambda folder, chart: charts.append(chart))
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
    assert charts[0].description.endswith("whether the claim holds in float32")
    rows = {row.label: row.verdict for row in charts[0].draw.keywords["rows"]}
    assert rows["RepVGG-A2 / ResNet-50"] == "holds"
    assert all(rows.values())
    assert not gpu.is_finished(steps[0], args.studies)


def test_tables_are_those_of_the_measurement_and_other_settings_are_refused(tmp_path, monkeypatch):
    tiny = gpu.all_steps(arguments(tmp_path, tiny=True, device="cpu"))
    paper = gpu.all_steps(arguments(tmp_path, device="cpu"))
    for small, step in zip(tiny, paper, strict=True):
        study = find_study(step.study)
        settled = flatten(study.resolve(small.settings))
        header = Header(step.study, as_stored({k: v for k, v in settled.items() if k not in study.free_settings}), {})
        found = flatten(study.resolve(gpu.as_measured(step, header).settings))
        assert {k: found[k] for k in header.settings} == {k: settled[k] for k in header.settings}
        CellStore(tmp_path / "studies" / step.name, header, {}).create()
    gpu.check_settings(tiny, tmp_path / "studies")
    with pytest.raises(SystemExit, match="networks-float32 was measured with batch 2, not 8: choose another --out"):
        gpu.check_settings(paper, tmp_path / "studies")
    monkeypatch.setattr(gpu, "write_chart", lambda folder, chart: None)
    assert "2 images a call" in gpu.report(paper, tmp_path / "studies", tmp_path)


def test_trainings_are_finished_without_the_cost_of_a_step(tmp_path):
    args = arguments(tmp_path, seeds=2)
    step = next(step for step in gpu.all_steps(args) if step.name == "table6")
    store = CellStore(args.studies / "table6", Header("table6", {}, {}), {})
    keys = [f"{row.name}-seed{seed}" for row in TABLE_6_VARIANTS for seed in range(2)]
    for key in keys:
        assert not gpu.is_finished(step, args.studies)
        store.put(key, {})
    assert gpu.is_finished(step, args.studies)
