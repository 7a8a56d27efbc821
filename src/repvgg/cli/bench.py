"""``repvgg bench``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg._progress import progress_bar
from repvgg.cli._interrupt import interrupt_message
from repvgg.cli._options import InputSize, JsonFlag, Number
from repvgg.cli._output import INTERRUPTED, write_json, write_line, write_table
from repvgg.errors import UsageError
from repvgg.measure import PROTOCOLS, REST_SECONDS, RunSettings, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from repvgg.measure import SpeedProtocol, Timing
    from repvgg.studies.candidates import Candidate
    from repvgg.studies.timing import BatchResult, SweepResult


@dataclasses.dataclass(frozen=True)
class _RunOptions(RunSettings):
    __doc__ = RunSettings.__doc__
    threads: Number = None


def bench(
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ("repvgg_a0",),
    baseline: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="MODEL")] = None,
    batch: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="IMAGES")] = None,
    input_size: InputSize = None,
    protocol: Literal["interleaved", "paper"] = "interleaved",
    rounds: Number = None,
    settings: Annotated[_RunOptions, tyro.conf.arg(name="")] = _RunOptions(),
    engine: Annotated[str, tyro.conf.arg(metavar="ENGINE")] = "torch",
    as_json: JsonFlag = False,
) -> int:
    """Time networks side by side: one in its three forms, or several against each other.

    RepVGG models are timed in the train form, with batch norms folded, and in the plain form (a checkpoint in the plain
    form in that alone); other models as they
    would be deployed, with batch norms (and branches, where that is exact) folded. Models by name have random weights.

    The interleaved protocol suits shared machines: each round times every network once, so a transient slowdown affects
    all of them equally; times are medians with quartiles, speed-ups are computed within each round. The paper's
    protocol (section 4.1) times 50 batches of 128 after 50 for warm-up, one network after the other; times are means.
    Batch 1 measures latency: on a GPU each call waits for its result. Larger batches are queued back to back.

    The engine "repvgg" is this library's; networks that it does not support are listed and left out. With several
    engines every network is timed in each, in the same rounds; --compile is for PyTorch. Before a network in an engine
    is timed, the threads of the one before come to rest, and the network runs once untimed.

    Exported files (.onnx, .ort, .xml, .pt2, .torchscript, .pte, .param) are MODELs, too: each in its own runtime.

    Networks that do not fit in memory are listed, and the rest is timed. Ctrl-C stops early and prints the results so
    far.

        repvgg bench repvgg_a0 --threads 1
        repvgg bench repvgg_a0 resnet18 --baseline resnet18 --batch 1,8,32
        repvgg bench repvgg_a2 resnet50 --protocol paper --device cuda
        repvgg bench train.safetensors --batch 16 --dtype bfloat16
        repvgg bench plain.safetensors --engine torch,repvgg
        repvgg bench repvgg_a0 --engine torch,repvgg,onnxruntime --batch 1,16
        repvgg bench plain.onnx plain.pte plain.xml --threads 1

    Args:
        models: names from 'repvgg list', baselines such as resnet50, timm:NAME, torchvision:NAME, FILE.py:FACTORY, or
            checkpoints, or exported files. Files .pt2, .torchscript and .pte and C libraries are programs: run only
            those that you trust.
        baseline: the model that speed-ups refer to (default: the first).
        batch: images per call, or several numbers separated by commas (default: the protocol's).
        input_size: height and width (default: each model's own).
        protocol: how often the networks are timed and in which order.
        rounds: number of timings of each network (default: the protocol's).
        settings: device, dtype and layout.
        engine: what runs the networks: torch, repvgg, repvgg-searched (which first measures the fastest algorithm of
            each convolution on this machine, and caches it), onnxruntime, openvino, executorch, ncnn, or several
            separated by commas.
        as_json: print JSON; times are in seconds.
    """
    from repvgg.studies.candidates import baseline_among, candidates_of, check_engines, runnable
    from repvgg.studies.timing import sweep

    chosen, batches = _protocol_and_batches(protocol, rounds, batch, input_size)
    engines = engine.split(",")
    check_engines(engines, settings)
    with settings.applied():
        machine = environment()
        candidates, left_out = runnable(candidates_of(models, input_size, engines))
        base = baseline_among(candidates, baseline)
        with interrupt_message(None), progress_bar("rounds", auto_refresh=False) as on_progress:
            result = sweep(candidates, batches, settings, chosen, baseline=base, on_progress=on_progress)
    if not any(one.names for one in result.batches):
        raise UsageError("There is not enough memory for any of these: take smaller or fewer images.")
    used = {"models": list(models), "batches": list(batches), "input_size": input_size, "protocol": protocol}
    used |= {"image_shapes": {candidate.model: list(candidate.image) for candidate in candidates}}
    used |= {"rounds": chosen.rounds, "engine": engine, **dataclasses.asdict(settings)}
    if as_json:
        write_json(_as_data(result) | {"left_out": left_out, "settings": used, "environment": machine})
    else:
        if note := _input_sizes_note(candidates):
            write_line(f"note: {note}")
        _print(result, candidates, chosen)
        for name, reason in left_out.items():
            write_line(f"{name}: left out, {reason}")
        _print_conditions(used, candidates, machine)
    return 0 if result.complete else INTERRUPTED


def _input_sizes_note(candidates: Sequence[Candidate]) -> str:
    """Return a sentence where models take images of different sizes, whose times do not compare; else nothing."""
    models: dict[tuple[int, ...], dict[str, None]] = {}
    for candidate in candidates:
        models.setdefault(candidate.image[1:], {})[candidate.model] = None
    if len(models) < 2:
        return ""
    sizes = ", ".join(f"{' and '.join(names)} {' x '.join(map(str, size))}" for size, names in models.items())
    return (
        f"the models take images of different sizes ({sizes}); --input-size gives all of them the same height and width"
    )


def _protocol_and_batches(
    protocol: str, rounds: int | None, batch: str | None, input_size: int | None
) -> tuple[SpeedProtocol, tuple[int, ...]]:
    chosen = PROTOCOLS[protocol]
    batches = (chosen.batch,) if batch is None else _numbers(batch)
    if min(*batches, 1 if rounds is None else rounds, 1 if input_size is None else input_size) < 1:
        raise UsageError("Batch, input size, rounds and threads are all at least 1.")
    return (chosen if rounds is None else dataclasses.replace(chosen, rounds=rounds)), batches


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--batch takes a number, or several separated by commas as in 1,8,32, not {text!r}."
        ) from error


def _as_data(result: SweepResult) -> dict[str, Any]:
    failures = [
        {"batch": one.batch, "name": name, "reason": reason}
        for one in result.batches
        for name, reason in one.failures.items()
    ]
    return {
        "timings": [
            {"batch": one.batch, **dataclasses.asdict(timing)} for one in result.batches for timing in one.timings
        ],
        "failures": failures,
        "denormals": {name: dataclasses.asdict(found) for name, found in result.denormals.items()},
        "complete": result.complete,
    }


def _print(result: SweepResult, candidates: Sequence[Candidate], protocol: SpeedProtocol) -> None:
    several = len(result.batches) > 1
    for one in result.batches:
        if several:
            write_line(f"batch {one.batch}")
        _print_batch(one, candidates, protocol)
        if several:
            write_line()
    if several:
        _print_best(result, protocol)
    for name, found in result.denormals.items():
        if found:
            write_line(f"{name}: {found}; they slow some CPUs down; --flush-denormal rounds them to 0")


def _print_batch(one: BatchResult, candidates: Sequence[Candidate], protocol: SpeedProtocol) -> None:
    average = "median" if protocol.interleaved else "mean"
    several = len({candidate.model for candidate in candidates}) > 1
    titles = ("model" if several else "form", f"{average} ms", "quartiles", "images/s", "speed-up", "quartiles")
    if one.names:
        write_table([titles, *(_cells(timing, one.batch, protocol) for timing in one.timings)])
    for name, reason in one.failures.items():
        write_line(f"{name}: out of memory ({reason})")
    for line in _not_faster(one, candidates):
        write_line(line)
    fewest = min((timing.rounds for timing in one.timings), default=0)
    if fewest:
        stopped = "" if fewest == protocol.rounds else f", interrupted before {protocol.rounds}"
        write_line(f"{fewest} rounds{stopped}; speed-ups over {one.timings[0].baseline}")


def _not_faster(one: BatchResult, candidates: Sequence[Candidate]) -> Iterator[str]:
    """Yield a sentence for each plain form that is not faster than its train form, or than the baseline."""
    from repvgg.studies.candidates import PLAIN, TRAIN

    names = {(candidate.model, candidate.engine, candidate.form): candidate.name for candidate in candidates}
    base = next(candidate for candidate in candidates if candidate.name == one.baseline)
    several = len({candidate.engine for candidate in candidates}) > 1
    for candidate in candidates:
        train = names.get((candidate.model, candidate.engine, TRAIN))
        if candidate.form != PLAIN or train is None:
            continue
        whose = "The plain form" if candidate.name == PLAIN else f"The plain form of {candidate.model}"
        whose += f" in {candidate.engine}" if several else ""
        others = {train: "the train form"} | ({base.name: base.name} if base.model != candidate.model else {})
        for other, words in others.items():
            faster = one.ratio(candidate.name, other)
            if faster and faster.q1 <= 1:
                yield f"{whose} is not clearly faster than {words} here."


def _seconds(timing: Timing, protocol: SpeedProtocol) -> float:
    return timing.median_seconds if protocol.interleaved else timing.mean_seconds


def _cells(timing: Timing, batch: int, protocol: SpeedProtocol) -> tuple[str, ...]:
    seconds = _seconds(timing, protocol)
    average, q1, q3 = (f"{1e3 * value:.2f}" for value in (seconds, timing.q1, timing.q3))
    ratios = f"{timing.ratio_q1:.2f}-{timing.ratio_q3:.2f}"
    speed = f"{batch / seconds:.1f}"
    return (timing.name, average, f"{q1}-{q3}", speed, f"{timing.ratio_to_baseline:.2f}", ratios)


def _print_best(result: SweepResult, protocol: SpeedProtocol) -> None:
    """Print the latency of one image, and the highest throughput over all batch sizes."""
    names = dict.fromkeys(name for one in result.batches for name in one.names)
    rows = []
    for name in names:
        found = {one.batch: _seconds(t, protocol) for one in result.batches for t in one.timings if t.name == name}
        best = max(found, key=lambda size: size / found[size])
        latency = f"{1e3 * found[1]:.2f}" if 1 in found else "-"
        rows.append((name, latency, f"{best / found[best]:.1f}", str(best)))
    write_table([("model", "ms for one image", "most images/s", "at batch"), *rows])


def _print_conditions(settings: dict[str, Any], candidates: Sequence[Candidate], machine: dict[str, str]) -> None:
    layout = "channels_last" if settings["channels_last"] else "contiguous"
    sizes = " and ".join(dict.fromkeys(f"{one.image[1]} x {one.image[2]}" for one in candidates))
    batches = ", ".join(map(str, settings["batches"]))
    more = [text for flag, text in (("compile", "compiled"), ("flush_denormal", "denormals flushed")) if settings[flag]]
    more += [] if settings["engine"] == "torch" else [f"engine {settings['engine'].replace(',', ', ')}"]
    what = [f"batch {batches}", sizes, settings["dtype"], layout, *more, f"{machine['threads']} threads"]
    write_line(f"{', '.join(settings['models'])}: {', '.join(what)}, protocol {settings['protocol']}")
    if any(candidate.engine != "torch" for candidate in candidates):
        write_line(
            f"Between networks: rest until the threads are idle, {1e3 * REST_SECONDS:.0f} ms or longer, because idle "
            "threads of an engine spin; then one untimed call."
        )
    if "gpu" in machine:
        write_line(
            f"{machine['gpu']}, driver {machine.get('driver', 'unknown')}, CUDA {machine.get('cuda', 'unknown')}"
        )
    about = {"governor": "governor {}", "load": "load {} at the start"}
    cpu = [words.format(machine[key]) for key, words in about.items() if key in machine]
    write_line(", ".join((machine["cpu"], machine["instructions"], f"{machine['cores']} cores", *cpu)))
    write_line(f"PyTorch {machine['torch']}, Python {machine['python']}, {machine['platform']}")
