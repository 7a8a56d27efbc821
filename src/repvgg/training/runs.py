"""A run with a folder: what ``repvgg train`` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from rich.console import Console

from repvgg.data import open_data
from repvgg.training.config import TrainConfig
from repvgg.training.decay import describe_groups
from repvgg.training.evaluation import Evaluation
from repvgg.training.fitting import FitResult, fit
from repvgg.training.folder import RunFolder, goes_on, take
from repvgg.training.job import Job
from repvgg.training.optim import optimizer_groups
from repvgg.training.plan import layout_of
from repvgg.training.saving import LAST
from repvgg.training.starting import Start, starting_model
from repvgg.training.trial import try_out


@final
@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run left.

    Attributes:
        folder: with everything in it.
        fit: the training.
        plain: the plain form on the held-out images; None where the trained model was plain already.
    """

    folder: Path
    fit: FitResult
    plain: Evaluation | None


def run(
    config: TrainConfig, folder: Path, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> RunResult | None:
    """Train as ``config`` says and leave a folder with the models, the log, the curve and the config.

    ``config.yaml`` repeats the run; ``last.ckpt`` lets it go on; ``train.safetensors`` and ``plain.safetensors`` are
    the model of the last epoch in both forms, ``best.safetensors`` that of the epoch with the highest held-out
    accuracy; ``log.csv`` and ``curve.png`` follow every epoch, TensorBoard's files too where it is installed.

    Args:
        config: the run.
        folder: where all of that goes; made if it does not exist.
        resume: go on from ``last.ckpt``, or begin if there is none; the config must be the one that is saved there.
        overwrite: begin anew in a folder that holds a run.
        console: where to tell what happens; standard output if None.

    Returns:
        What came out; None on all processes but the first.

    Raises:
        OutputExistsError: ``folder`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        UsageError: the run that is to go on was another one.
        RepvggError: see :func:`repvgg.training.fit` and :func:`repvgg.data.open_data`.
    """
    layout = layout_of(config)
    told = _Told(console or Console(), quiet=layout.rank > 0)
    writes = layout.rank == 0
    going_on = goes_on(folder, config, resume=resume, overwrite=overwrite, writes=writes)
    data = open_data(config.data, seed=config.seed)
    start = starting_model(config, data)
    job = Job(start.model, data, config, layout)
    _introduce(job, start, told)
    if going_on:
        told(f"goes on from {folder / LAST}")
    elif config.dry_run:
        told(str(try_out(start.model, data, config)))
    if writes:
        take(folder, config, going_on=going_on)
    kept = RunFolder(folder, config, data, start.model)
    result = fit(
        start.model,
        data,
        config,
        folder=folder,
        resume=going_on,
        console=told.console,
        layout=layout,
        on_epoch=kept.keep_epoch,
    )
    return None if layout.rank else _finish(kept, result, told)


@final
@dataclass(frozen=True)
class _Told:
    """Says lines that nothing wraps or colours."""

    console: Console
    quiet: bool

    def __call__(self, line: str, indent: str = "  ") -> None:
        if not self.quiet:
            self.console.print(indent + line, highlight=False, soft_wrap=True, markup=False)


def _introduce(job: Job, start: Start, told: _Told) -> None:
    """Say everything that decides the outcome."""
    data, config = job.data, job.config
    shape = "x".join(map(str, data.input_shape))
    told(
        f"Train {start.model.spec.name} on {data.uri}: {_count(data.num_train)} images of {shape} in "
        f"{len(data.classes)} classes, judged by {_count(data.num_held_out)} others",
        indent="",
    )
    for note in (*start.notes, *data.notes):
        told(note)
    told(f"{job.plan}, {config.epochs} epochs, decay policy {config.optim.decay!r}")
    for line in describe_groups(optimizer_groups(start.model, config.optim)):
        told(line)


def _count(number: int | None) -> str:
    return "a stream of" if number is None else f"{number:,}"


def _finish(kept: RunFolder, result: FitResult, told: _Told) -> RunResult:
    """Leave both forms, and say how good they are."""
    plain = kept.finish(result)
    forms = {"train form" if plain else "model": result.held_out}
    if plain is not None:
        forms["plain form"], evidence = plain
        told(f"plain form: relative error {evidence.relative:.1e}, {evidence.tolerance:.1e} allowed")
    for name, one in forms.items():
        right = f"{one.correct:,} of {len(one.labels):,} right"
        told(f"{name:10}  top-1 {one.accuracy:.2%}  top-5 {one.top(5):.2%}  {right}")
    bad = kept.data.bad
    if bad.count:
        told(f"{bad.count} broken images were skipped, {': '.join(bad.first(1)[0])} first")
    told(f"wrote {kept.path}")
    return RunResult(kept.path, result, plain[0] if plain else None)
