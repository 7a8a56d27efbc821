"""``repvgg bench``."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from collections.abc import Iterator

    from repvgg.measure import Timing
    from repvgg.models import RepVGG

Dtype = Literal["float32", "bfloat16", "float16"]


def bench(
    model: Annotated[str, tyro.conf.Positional] = "repvgg_a0",
    batch: int = 1,
    input_size: int | None = None,
    rounds: int = 30,
    threads: int | None = None,
    dtype: Dtype = "float32",
    channels_last: bool = False,
    as_json: bool = False,
) -> None:
    """Time a model on this CPU in its three forms: train form, batch norms folded, plain.

    Every round times each form once, so that a slow spell of the machine hits all alike; times are medians with
    quartiles, speed-ups are taken within each round. Ctrl-C stops early and keeps what was measured.

    Args:
        model: a name from 'repvgg list' (random weights), or a checkpoint in the train form.
        batch: images a call.
        input_size: height and width; without it what the model is made for.
        rounds: how often each form is timed.
        threads: CPU threads; without it what PyTorch takes.
        dtype: of weights and images.
        channels_last: keep images and weights in NHWC.
        as_json: print JSON.
    """
    from repvgg.errors import UsageError

    if min(batch, rounds, input_size or 1, threads or 1) < 1:
        raise UsageError("Batch, input size, rounds and threads are all at least 1.")
    train, size = _model(model, input_size)
    with _threads(threads):
        timings, stamp = _measure(train, batch, size, rounds, dtype, channels_last)
    stamp |= {"model": model, "batch": str(batch), "input_size": str(size), "dtype": dtype}
    if as_json:
        entries = [timing.to_dict() for timing in timings]
        sys.stdout.write(json.dumps({"timings": entries, "environment": stamp}, indent=1) + "\n")
    else:
        _print(timings, batch, stamp)


def _model(name: str, input_size: int | None) -> tuple[RepVGG, int]:
    from repvgg.errors import CheckpointError
    from repvgg.models import create_model, load, spec_of

    if not (Path(name).suffix or Path(name).exists()):
        return create_model(name).eval(), input_size or spec_of(name).input_size
    loaded = load(name)
    if loaded.metadata.form == "plain":
        raise CheckpointError(f"{name!r} is in the plain form already: give a checkpoint in the train form.")
    return loaded.model, input_size or loaded.metadata.input_size


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """PyTorch with that many threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    return compare(calls, rounds=rounds), environment()


def _print(timings: list[Timing], batch: int, stamp: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("form")
    for title in ("median ms", "quartiles", "images/s", "speed-up", "quartiles"):
        table.add_column(title, justify="right")
    for t in timings:
        times = f"{1e3 * t.median_seconds:.2f}", f"{1e3 * t.q1:.2f}-{1e3 * t.q3:.2f}"
        ratios = f"{t.ratio_to_baseline:.2f}", f"{t.ratio_q1:.2f}-{t.ratio_q3:.2f}"
        table.add_row(t.name, *times, f"{batch / t.median_seconds:.1f}", *ratios)
    console = Console(highlight=False)
    console.print(table)
    plain = timings[-1]
    if plain.ratio_q1 <= 1:
        console.print("[bold]The plain form is not clearly faster than the train form here.[/]")
    console.print(", ".join(f"{key} {value}" for key, value in stamp.items()), style="dim")
