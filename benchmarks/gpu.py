"""The paper's tables on one GPU in one call, for a machine that is lent for minutes and downloads nothing.

    python benchmarks/gpu.py --data imagefolder:cifar10 --budget 540 --out gpu
    python benchmarks/gpu.py --steps table6 table7 --data imagefolder:cifar10 --budget 300 --out gpu
    python benchmarks/gpu.py --tables --out gpu                                      anywhere, from what was measured
    python benchmarks/gpu.py --device cpu --tiny --data digits: --budget 300 --out runs/gpu-tiny

Steps are studies (``repvgg study``) at the paper's sizes: the networks of Tables 4 and 5 and Figure 1 (128 images of
224x224), Table 1, the speeds of Table 6, and Figure 3, in float32, tf32, float16 and bfloat16, the smaller networks
also compiled; then the trainings of Tables 6 and 7 on CIFAR-10 with the recipe ``cifar-paper``. The most valuable come
first; ``--steps`` takes others, in their order.

Every cell is a file in the folder of its study as soon as it is measured; ``results.jsonl`` holds all of them, a line
for each, and is replaced every few seconds. When the budget ends, the step at work is interrupted, and keeps its cells.
The same command continues; where only ``results.jsonl`` is left, it restores the folders from it. A step that fails is
named in ``errors.txt``, and the next one runs. ``--studies`` keeps the folders out of ``--out``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from repvgg._files import write_text
from repvgg.measure import RunSettings
from repvgg.studies import find_study
from repvgg.studies.ablation import AblationSettings, Job
from repvgg.studies.base import flatten, run_study
from repvgg.studies.block_speed import BranchSettings, KernelSettings
from repvgg.studies.claims import ClaimResult, claims_chart, claims_table
from repvgg.studies.figure3 import MemorySettings
from repvgg.studies.network_speed import NetworkSettings
from repvgg.studies.paper import SPEED_CLAIMS, TABLE_4, TABLE_5
from repvgg.studies.report.charts import write_chart
from repvgg.studies.store import CELLS, HEADER, CellStore, Header, as_stored, read_header
from repvgg.studies.tables import as_markdown
from repvgg.studies.timing import Speeds
from repvgg.studies.variants import TABLE_6_VARIANTS, TABLE_7_VARIANTS, select_variants

RESULTS, ERRORS, AT_WORK, REPORT = "results.jsonl", "errors.txt", "step.txt", "results.md"
SAVE_SECONDS, STOP_SECONDS = 5, 20  # between two results files; for an interrupted step to write its tables
COMPILED_GMACS = 5.2  # A0, A1, A2 and the networks they are compared with: compiling takes many seconds a network
TRAINED = {"table6": TABLE_6_VARIANTS, "table7": TABLE_7_VARIANTS}
NETWORKS = "networks-"  # steps that time the networks of Tables 4 and 5 and Figure 1 together


@dataclass(frozen=True)
class Step:
    """A study with its settings, and the folder of its cells."""

    name: str
    study: str
    settings: Any


def all_steps(args: argparse.Namespace) -> list[Step]:
    """Return the steps, the most valuable first; ``--tiny`` takes seconds on a CPU."""
    tiny = args.tiny

    def run(dtype: str, compiled: bool = False) -> RunSettings:
        # Half-precision kernels of cuDNN are written for NHWC; float32 as in the paper.
        return RunSettings(args.device, dtype, channels_last="16" in dtype, compile=compiled)

    def networks(dtype: str, compiled: bool = False) -> Step:
        size = {"batch": 2, "input_size": 32, "rounds": 2, "max_gmacs": 2.0} if tiny else {"rounds": 20}
        if compiled and not tiny:
            size["max_gmacs"] = COMPILED_GMACS
        settings = NetworkSettings(run=run(dtype, compiled), **size)
        return Step(f"{NETWORKS}{dtype}{'-compiled' * compiled}", "figure1", settings)

    def branches(dtype: str, compiled: bool = False) -> Step:
        size = {"batch": 2, "input_size": 32, "rounds": 2} if tiny else {}
        settings = BranchSettings(run=run(dtype, compiled), **size)
        return Step(f"table6-speed-{dtype}{'-compiled' * compiled}", "table6-speed", settings)

    def kernels(dtype: str) -> Step:
        size = {"batch": 1, "channels": 8, "size": 8, "rounds": 2} if tiny else {}
        return Step(f"table1-{dtype}", "table1", KernelSettings(run=run(dtype), **size))

    def memory(dtype: str) -> Step:
        size = {"batch": 1, "channels": 8, "size": 8, "input_size": 32} if tiny else {}
        return Step(f"figure3-{dtype}", "figure3", MemorySettings(run=run(dtype), **size))

    def training(table: str, seeds: int) -> Step:
        size = {"model": "repvgg_t0", "input_size": 8, "epochs": 1, "rows": ("repvgg",)} if tiny else {}
        settings = AblationSettings(
            recipe="cifar-paper",
            data=args.data,
            device=args.device,
            seeds=seeds,
            jobs=args.jobs,
            part="trainings",
            **size,
        )
        return Step(table, table, settings)

    others = ("bfloat16",) if args.device == "cpu" else ("float16", "bfloat16", "tf32")
    steps = [networks("float32"), branches("float32"), kernels("float32"), memory("float32"), networks(others[0])]
    steps += [make(others[0]) for make in (branches, kernels)]
    if args.data or args.tables:
        steps += [training("table6", args.seeds), training("table7", args.seeds)]
    if args.device == "cuda":  # compiling for a CPU needs a C++ compiler, and takes long
        steps += [branches("float32", compiled=True), networks("float16", compiled=True)]
    steps += [make(dtype) for dtype in others[1:] for make in (networks, branches, kernels)]
    steps += [memory(dtype) for dtype in others]
    if args.device == "cuda":
        steps += [branches("float16", compiled=True), networks("float32", compiled=True)]
    return steps


def is_finished(step: Step, studies: Path) -> bool:
    """Return whether no cell of a step is missing."""
    folder = studies / step.name
    if not (folder / HEADER).exists():
        return False
    if isinstance(step.settings, AblationSettings):
        # Their study is finished only with the cost of a training step, which is no part of these steps.
        rows = select_variants(TRAINED[step.study], step.settings.rows)
        jobs = [Job(row, seed) for row in rows for seed in range(step.settings.seeds)]
        return all((folder / CELLS / f"{job.key}.json").exists() for job in jobs)
    return bool(read_header(folder).finished)


def work(steps: list[Step], args: argparse.Namespace) -> None:
    """Run the steps in this process; one that fails is written to a file."""
    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    for step in steps:
        write_text(args.studies / AT_WORK, step.name, overwrite=True)
        settings, started = step.settings, time.monotonic()
        if step.study == "table7" and (args.studies / "table6" / HEADER).exists():
            settings = replace(settings, reuse=args.studies / "table6")  # the full block is in both
        try:
            done = run_study(find_study(step.study), settings, args.studies / step.name, command=command)
            print(f"{step.name}: {time.monotonic() - started:.0f} s. {done.outcome.lead}", flush=True)
            if not done.complete and not done.missing:  # interrupted
                return
        except Exception as error:  # a step must not take the others with it
            note_error(args.out, f"{step.name}: {type(error).__name__}: {error}")
            leave_if_cuda_failed()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def leave_if_cuda_failed() -> None:
    """End this process if the GPU answers no more, as after an illegal access: every later step would fail in it."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise SystemExit(f"CUDA has failed in this process: {error}") from error


def note_error(out: Path, text: str) -> None:
    print(text, flush=True)
    with (out / ERRORS).open("a", encoding="utf-8") as file:
        file.write(text.replace("\n", " ") + "\n")


def supervise(names: list[str], args: argparse.Namespace, deadline: float) -> None:
    """Run the steps in a process of their own, and restart after the step that crashed it; save what there is."""
    while names and time.monotonic() < deadline:
        command = [sys.executable, __file__, *sys.argv[1:], "--work", "--steps", *names]
        at_work = args.studies / AT_WORK
        at_work.unlink(missing_ok=True)  # that of an earlier process
        # A session of its own: an interruption reaches the processes that the step has started, too.
        child = subprocess.Popen(command, start_new_session=True)
        saved = time.monotonic()
        try:
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save(args.studies, args.out)
                    saved = time.monotonic()
        finally:  # also when this process is interrupted: the other one would go on without it
            in_time = child.poll() is not None
            if not in_time:
                stop(child)
            save(args.studies, args.out)
        if not in_time or child.returncode == 0:
            break
        if not at_work.exists():
            note_error(args.out, f"The process of the steps did not start: it ended with {child.returncode}")
            break
        failed = at_work.read_text(encoding="utf-8")
        note_error(args.out, f"{failed}: its process ended with {child.returncode}")
        names = names[names.index(failed) + 1 :]


def stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and those that it has started; kill them if they do not end, or at a second Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(STOP_SECONDS)
            return


def save(studies: Path, out: Path) -> None:
    """Write the headers and cells of all steps to one file."""
    files = sorted([*studies.glob(f"*/{HEADER}"), *studies.glob("*/cells/*.json")])
    lines = []
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        lines.append(json.dumps({"file": path.relative_to(studies).as_posix(), "content": content}))
    if lines:
        write_text(out / RESULTS, "\n".join(lines) + "\n", overwrite=True)


def restore(studies: Path, out: Path) -> None:
    """Write the files that the results have and the folders lack."""
    if not (out / RESULTS).exists():
        return
    for line in (out / RESULTS).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        path = studies / entry["file"]
        if studies.resolve() in path.resolve().parents and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(entry["content"], indent=1) + "\n")


def check_settings(steps: list[Step], studies: Path) -> None:
    """Refuse to continue, or to skip, what was measured with other settings."""
    for step in steps:
        if not (studies / step.name / HEADER).exists():
            continue
        study, theirs = find_study(step.study), read_header(studies / step.name).settings
        for name, ours in as_stored(flatten(study.resolve(step.settings))).items():
            if name not in study.free_settings and theirs.get(name) != ours:
                raise SystemExit(
                    f"{step.name} was measured with {name} {theirs.get(name)!r}, not {ours!r}: choose another --out."
                )


def as_measured(step: Step, header: Header) -> Step:
    """Return a step with the settings of its measurement, which may be those of another call."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in header.settings.items()}

    def stored(settings: Any) -> dict[str, Any]:
        return {field.name: values[field.name] for field in fields(settings) if field.name in values}

    chosen = stored(step.settings)
    if not isinstance(step.settings, AblationSettings):  # where it follows from the others
        chosen["run"] = replace(step.settings.run, **stored(step.settings.run))
    return replace(step, settings=replace(step.settings, **chosen))


def report(steps: list[Step], studies: Path, out: Path) -> str:
    """Return the tables of all steps that have cells; draw the claims in every precision."""
    parts, claims = [], []
    for step in steps:
        if not (studies / step.name / HEADER).exists():
            continue
        header = read_header(studies / step.name)
        step = as_measured(step, header)
        store = CellStore(studies / step.name, header, {})
        store.refresh_all()
        names = ("table4", "table5", "figure1") if step.name.startswith(NETWORKS) else (step.study,)
        machine = ", ".join(f"{name} {value}" for name, value in header.environment.items())
        parts.append(
            f"# {step.name}\n\n{header.started}; {machine}{'' if is_finished(step, studies) else '; not finished'}"
        )
        for name in names:
            study = find_study(name)
            outcome = study.outcome(study.resolve(step.settings), store.values)
            # Parameters and arithmetic are those of every machine.
            parts += [outcome.lead, *(as_markdown(one) for one in outcome.tables if not one.name.endswith("-counts"))]
        if step.name.startswith(NETWORKS):
            claims += claims_of(step.name.removeprefix(NETWORKS), Speeds.from_cells(store.values, 1))
    if claims:
        parts.insert(0, as_markdown(claims_table("gpu", claims)))
        judged = claims[0].where  # float32, as in the paper, if it was measured
        caption = (
            "How many times as fast as another network each RepVGG is, in the paper and here in each precision; at the "
            f"right, whether the claim holds in {judged}"
        )
        write_chart(out, claims_chart("gpu", claims, judged, caption))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def claims_of(where: str, speeds: Speeds) -> list[ClaimResult]:
    printed = {row.model: row.images_per_second for row in (*TABLE_4, *TABLE_5)}
    ratios = {pair: speeds.ratio(*pair) for pair in SPEED_CLAIMS}
    return [
        ClaimResult(*pair, where, ("torch", "torch"), printed[pair[0]] / printed[pair[1]], ratio)
        for pair, ratio in ratios.items()
        if ratio is not None
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--studies", type=Path, help="folders of the cells; default: in --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", help="URI of CIFAR-10; without it nothing is trained")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, all in all")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--jobs", type=int, default=4, help="trainings at a time")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="these, in the usual order")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--tables", action="store_true", help="write the tables of what was measured")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.studies = args.studies or args.out / "studies"
    return args


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    started = time.monotonic()
    args = parse()
    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C: the process of the steps ends, too
    for folder in (args.out, args.studies):
        folder.mkdir(parents=True, exist_ok=True)
    restore(args.studies, args.out)
    steps = all_steps(args)
    if unknown := set(args.steps or ()) - {step.name for step in steps}:
        raise SystemExit(f"There is no step {min(unknown)}: take {', '.join(step.name for step in steps)}.")
    chosen = [step for step in steps if not args.steps or step.name in args.steps]
    if not args.tables:
        check_settings(chosen, args.studies)
    left = [step for step in chosen if not is_finished(step, args.studies)]
    if args.work:
        work(left, args)
        return
    if not args.tables:
        supervise([step.name for step in left], args, started + args.budget - STOP_SECONDS)
    write_text(args.out / REPORT, report(steps, args.studies, args.out), overwrite=True)
    print(args.out / REPORT)


if __name__ == "__main__":
    main()
