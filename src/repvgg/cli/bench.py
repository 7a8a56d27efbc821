"""``repvgg bench``."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from repvgg.measure import Timing
    from repvgg.models import RepVGG

Dtype = Literal["float32", "bfloat16", "float16"]
_TITLES = ("form", "median ms", "quartiles", "images/s", "speed-up", "quartiles")


def bench(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "repvgg_a0",
    batch: Annotated[int, tyro.conf.arg(metavar="IMAGES")] = 1,
    input_size: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="PIXELS")] = None,
    rounds: int = 30,
    threads: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None,
    dtype: Dtype = "float32",
    channels_last: bool = False,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Time a model on this CPU in its three forms: train form, batch norms folded, plain.

    Every round times each form once, so that a slow spell of the machine hits all alike; times are medians with
    quartiles, speed-ups are taken within each round. Ctrl-C stops early and keeps what was measured.

        repvgg bench repvgg_a0 --threads 1
        repvgg bench train.safetensors --batch 16 --dtype bfloat16

    Args:
        model: a name from 'repvgg list' (random weights), or a checkpoint in the train form.
        batch: images a call.
        input_size: height and width; without it what the model is made for.
        rounds: how often each form is timed.
        threads: CPU threads; without it what PyTorch takes.
        dtype: of weights and images.
        channels_last: keep images and weights in NHWC.
        as_json: print JSON; times are in seconds.
    """
    from repvgg.cli.terminal import write_json
    from repvgg.errors import UsageError
    from repvgg.modes import threads as using

    if min(batch, rounds, *(number for number in (input_size, threads) if number is not None)) < 1:
        raise UsageError("Batch, input size, rounds and threads are all at least 1.")
    train, size = _model(model, input_size)
    with using(threads):
        timings, stamp = _measure(train, batch, size, rounds, dtype, channels_last)
    settings = {"model": model, "batch": batch, "input_size": size, "dtype": dtype, "channels_last": channels_last}
    if as_json:
        entries = [timing.to_dict() for timing in timings]
        write_json({"timings": entries, "settings": settings, "environment": stamp})
    else:
        _print(timings, batch)
        _print_stamp(settings, stamp)


def _model(name: str, input_size: int | None) -> tuple[RepVGG, int]:
    from repvgg.errors import CheckpointError
    from repvgg.models import create_model, list_models, load, spec_of

    path = Path(name)
    if name in list_models() or not (path.suffix or len(path.parts) > 1 or path.exists()):
        spec = spec_of(name)
        return create_model(spec).eval(), input_size or spec.input_size
    loaded = load(path)
    if loaded.metadata.form == "plain":
        raise CheckpointError(f"{name!r} is in the plain form already: give a checkpoint in the train form.")
    return loaded.model, input_size or loaded.metadata.input_size


def _measure(
    train: RepVGG, batch: int, size: int, rounds: int, dtype: Dtype, channels_last: bool
) -> tuple[list[Timing], dict[str, str]]:
    import torch

    from repvgg.collapse import fold_batch_norms, reparameterize
    from repvgg.measure import compare, environment

    layout = torch.channels_last if channels_last else torch.contiguous_format
    forms = {
        "train form": train,
        "batch norms folded": fold_batch_norms(train)[0],
        "plain form": reparameterize(train)[0],
    }
    images = torch.randn(batch, train.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(dtype=getattr(torch, dtype), memory_format=layout)
    calls = {}
    for name, form in forms.items():
        form.to(getattr(torch, dtype)).to(memory_format=layout)
        calls[name] = partial(form, images)
    with _progress(rounds) as on_progress:
        return compare(calls, rounds=rounds, on_progress=on_progress), environment()


@contextmanager
def _progress(rounds: int) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, beside standard output; nothing elsewhere. Drawn between rounds, not while one runs."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("rounds", total=rounds)
        progress.refresh()
        yield lambda done, total: progress.update(task, completed=done, total=total, refresh=True)


def _print(timings: list[Timing], batch: int) -> None:
    from repvgg.cli.terminal import write_line, write_table

    write_table([_TITLES, *(_cells(timing, batch) for timing in timings)])
    if timings[-1].ratio_q1 <= 1:
        write_line("The plain form is not clearly faster than the train form here.")
    write_line(f"{timings[0].rounds} rounds")


def _print_stamp(settings: dict[str, Any], stamp: dict[str, str]) -> None:
    from repvgg.cli.terminal import write_line

    layout = "channels_last" if settings["channels_last"] else "contiguous"
    size = f"batch {settings['batch']}, {settings['input_size']} x {settings['input_size']}"
    write_line(f"{settings['model']}: {size}, {settings['dtype']}, {layout}, {stamp['threads']} threads")
    write_line(f"{stamp['cpu']}, {stamp['instructions']}, {stamp['cores']} cores")
    write_line(f"PyTorch {stamp['torch']}, Python {stamp['python']}, {stamp['platform']}")


def _cells(timing: Timing, batch: int) -> tuple[str, ...]:
    milliseconds = [1e3 * seconds for seconds in (timing.median_seconds, timing.q1, timing.q3)]
    median, q1, q3 = (f"{value:.2f}" for value in milliseconds)
    ratio = f"{timing.ratio_to_baseline:.2f}"
    ratios = f"{timing.ratio_q1:.2f}-{timing.ratio_q3:.2f}"
    return (timing.name, median, f"{q1}-{q3}", f"{batch / timing.median_seconds:.1f}", ratio, ratios)
