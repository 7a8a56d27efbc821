"""The whole way once, on real scans: train, collapse, verify, time, export, report.

    repvgg quickstart

Expected: at least 99.0% on the 360 held-out digits, every judgement passed, within 2 minutes on 2 cores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from repvgg import collapse, measure, models
from repvgg._files import write_text
from repvgg.data import ImageData, open_data
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.errors import EquivalenceError, ExportError, OutputError, OutputExistsError
from repvgg.studies import report as page
from repvgg.training import FitResult, TrainConfig, fit, quickstart, seeded
from repvgg.verify import Evidence, border_inputs, verify

MODEL = "repvgg_t0"
FOLDER = Path("runs/quickstart")
TRAIN_FILE, PLAIN_FILE, ONNX_FILE = "train.safetensors", "plain.safetensors", "plain.onnx"
JSON_FILE, HTML_FILE = "report.json", "report.html"
_BATCH = 64
_SAMPLES = 24
_PURPOSES = {
    TRAIN_FILE: "the trained model with its branches: train it further, or convert it again",
    PLAIN_FILE: "the plain model, one convolution a block: ship this one",
    ONNX_FILE: "the plain model for ONNX Runtime and everything else that reads ONNX",
    JSON_FILE: "every number of this page, for programs",
    HTML_FILE: "this page",
}


@dataclass(frozen=True, eq=False)
class _Forms:
    """The three forms of the trained network."""

    train: models.RepVGG
    folded: nn.Module
    plain: models.RepVGG
    report: collapse.Report


@dataclass(frozen=True, eq=False)
class _Judged:
    """What was judged, on what, and what came out."""

    subject: str
    inputs: str
    evidence: Evidence


def run(out: Path | None = None, seed: int = 0, *, overwrite: bool = False, console: Console | None = None) -> Path:
    """Go the whole way and leave a folder with the models and a report.

    The folder appears when everything in it is whole; interrupted, the run leaves nothing.

    Args:
        out: the folder; None takes ``runs/quickstart``, or the next free name beside it.
        seed: of the first weights, the order of the images and their augmentation.
        overwrite: replace ``out`` if it exists.
        console: where to tell what happens; standard output if None.

    Returns:
        The folder.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is not set.
        EquivalenceError: a converted model is not equal to the trained one.
    """
    console = console or Console()
    target = _free(FOLDER) if out is None else out
    with _whole_folder(target, overwrite) as folder:
        config = quickstart(seed)
        data = open_data(config.data, seed=seed)
        trained, result = _train(data, config, console)
        forms = _collapse(trained, console)
        judged = _verify(forms, data, console)
        _save(folder, forms, data, result)
        onnx = _export(folder, forms, data, console)
        judged += [_judge("Plain form, ONNX Runtime", *_held_out(data), forms.train, onnx, console)]
        timings = _time(forms, onnx, data, console)
        report = _report(target, folder, seed, data, result, forms, judged, timings)
        _write(folder, report)
    _summary(target, report, console)
    return target


def _free(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, … that does not exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextmanager
def _whole_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when all is done, and is removed otherwise."""
    if target.exists() and not (overwrite and target.is_dir()):
        raise OutputExistsError(f"{str(target)!r} exists: choose another folder, or ask to overwrite it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be made: {error.strerror or error}.") from error
    try:
        yield folder
        mode = target.parent.stat().st_mode & 0o777  # a temporary folder is nobody else's to read; this one is
        folder.chmod(mode)
        _exchange(folder, target)
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(folder: Path, target: Path) -> None:
    """Give ``folder`` the name ``target``; what had it is kept until that is done."""
    if not target.exists():
        folder.replace(target)
        return
    before = folder.with_name(f"{folder.name}-before")
    target.replace(before)
    try:
        folder.replace(target)
    except BaseException:
        before.replace(target)
        raise
    shutil.rmtree(before)


def _train(data: ImageData, config: TrainConfig, console: Console) -> tuple[models.RepVGG, FitResult]:
    console.print(f"[bold]Train[/] {MODEL} on {data.num_train} digits, judge by {data.num_val} others")
    with seeded("model", config.seed):
        model = models.create_model(MODEL, len(data.classes), data.input_shape[0])
    result = fit(model, data, config, console=console)
    console.print(f"  {result.accuracy:.2%} of the held-out digits are right, after {result.seconds:.0f} s")
    return model, result


def _collapse(model: models.RepVGG, console: Console) -> _Forms:
    plain, report = collapse.reparameterize(model)
    folded, _ = collapse.fold_batch_norms(model)
    assert isinstance(plain, models.RepVGG)
    console.print("[bold]Collapse[/] every block into one convolution")
    for region in report.folded:
        branches = ", ".join(_branches(region))
        console.print(f"  {region.name:16} {branches} → {region.convolution}", highlight=False, soft_wrap=True)
    return _Forms(model, folded, plain, report)


def _branches(region: collapse.Folded) -> list[str]:
    """A description for each branch, such as ``3x3 conv + BN``."""
    words = (("PointwiseConv2d", "conv"), ("Conv2d", "conv"), ("BatchNorm2d", "BN"))
    branches = []
    for part in region.parts:
        text = part.description
        for name, word in words:
            text = text.replace(name, word)
        branches.append(text if "conv" in text else f"identity + {text}")
    return branches


def _held_out(data: ImageData) -> tuple[str, list[Tensor]]:
    """The held-out images, in batches, and what to call them."""
    batches = [data.prepare(images) for images, _ in data.val_batches(_BATCH)]
    return f"{data.num_val} held-out images", batches


def _verify(forms: _Forms, data: ImageData, console: Console) -> list[_Judged]:
    console.print("[bold]Verify[/] against the trained model in float64")
    channels, height, width = data.input_shape
    border = "random images that make borders count", border_inputs((16, channels, height, width), batches=3)
    return [
        _judge("Plain form", *_held_out(data), forms.train, forms.plain, console),
        _judge("Plain form", *border, forms.train, forms.plain, console),
        _judge("Batch norms folded", *_held_out(data), forms.train, forms.folded, console),
    ]


def _judge(
    subject: str,
    inputs: str,
    batches: list[Tensor],
    reference: nn.Module,
    candidate: Callable[[Tensor], Tensor],
    console: Console,
) -> _Judged:
    evidence = verify(reference, candidate, batches).raise_if_failed()
    agreement = evidence.agreement
    same = f", {agreement.agreed}/{agreement.total} predictions agree" if agreement else ""
    error = f"relative error {evidence.relative:.1e}, tolerance {evidence.tolerance:.1e}"
    console.print(f"  {subject}, {inputs}: {error}{same}", highlight=False, soft_wrap=True)
    if agreement and agreement.agreed != agreement.total:
        raise EquivalenceError(
            f"The {subject} predicts {agreement.total - agreement.agreed} of the {inputs} differently."
        )
    return _Judged(subject, inputs, evidence)


def _save(folder: Path, forms: _Forms, data: ImageData, result: FitResult) -> None:
    about = {
        "input_size": data.input_shape[1],
        "mean": data.mean,
        "std": data.std,
        "classes": data.classes,
        "recipe": asdict(result.config),
        "metrics": {"held_out_accuracy": result.accuracy},
    }
    models.save(folder / TRAIN_FILE, forms.train, models.describe_model(forms.train, "train", **about))
    models.save(folder / PLAIN_FILE, forms.plain, models.describe_model(forms.plain, "plain", **about))


def _export(folder: Path, forms: _Forms, data: ImageData, console: Console) -> OnnxRunner:
    console.print("[bold]Export[/] the plain form to ONNX")
    exported = export_onnx(forms.plain, folder / ONNX_FILE, data.input_shape)
    if exported.plain_violations():
        raise ExportError(f"The exported file is not plain: {exported.plain_violations()[0]}.")
    nodes = ", ".join(f"{count} {name}" for name, count in exported.operators.items())
    console.print(f"  opset {exported.opset}: {nodes}", highlight=False)
    return OnnxRunner(folder / ONNX_FILE, threads=torch.get_num_threads())


def _time(forms: _Forms, onnx: OnnxRunner, data: ImageData, console: Console) -> list[page.Timing]:
    console.print(f"[bold]Time[/] the forms side by side, batches of {_BATCH}")
    images, _ = data.val_images(range(_BATCH))
    roles: dict[str, tuple[page.Role, Callable[[Tensor], object]]] = {
        "Train form": ("train", forms.train),
        "Batch norms folded": ("folded", forms.folded),
        "Plain form": ("plain", forms.plain),
        "Plain form, ONNX Runtime": ("runtime", onnx),
    }
    calls = {name: _call(model, images) for name, (_, model) in roles.items()}
    timings = []
    for t in measure.compare(calls):
        times, ratios = (t.median_seconds, t.q1, t.q3), (t.ratio_to_baseline, t.ratio_q1, t.ratio_q3)
        timings.append(page.Timing(t.name, roles[t.name][0], *times, *ratios, batch=_BATCH, rounds=t.rounds))
        console.print(f"  {t}", highlight=False, soft_wrap=True)
    return timings


def _call(model: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    return lambda: model(images)


def _report(
    target: Path,
    folder: Path,
    seed: int,
    data: ImageData,
    result: FitResult,
    forms: _Forms,
    judged: list[_Judged],
    timings: list[page.Timing],
) -> page.Report:
    confusion = tuple(tuple(row) for row in result.validation.confusion.tolist())
    history = tuple(page.Epoch(e.epoch, e.loss, e.held_out_accuracy) for e in result.history)
    return page.Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"repvgg quickstart --seed {seed}",
        seed=seed,
        model=_model(forms, data),
        data=page.Data(data.uri, data.num_train or 0, data.num_val or 0, data.classes),
        training=page.Training(len(history), result.seconds, history, result.accuracy, confusion),
        regions=_regions(forms, judged[0].evidence),
        left=tuple(page.Unchanged(row.name, row.reason) for row in (*forms.report.left, *forms.report.dropped)),
        evidence=tuple(_judgement(one) for one in judged),
        timings=tuple(timings),
        samples=_samples(forms, data),
        files=_files({path.name: path.stat().st_size for path in folder.iterdir()}),
        next_commands=_next_commands(target),
        environment=measure.environment(),
    )


def _model(forms: _Forms, data: ImageData) -> page.Model:
    shape = (1, *data.input_shape)
    train, plain = measure.count(forms.train, shape), measure.count(forms.plain, shape)
    return page.Model(
        name=MODEL,
        num_classes=len(data.classes),
        in_channels=data.input_shape[0],
        input_size=data.input_shape[1],
        params_train=train.params,
        params_plain=plain.params,
        macs_train=train.macs,
        macs_plain=plain.macs,
    )


def _regions(forms: _Forms, evidence: Evidence) -> tuple[page.Region, ...]:
    errors = {layer.name: layer for layer in evidence.layers}
    regions = []
    for folded in forms.report.folded:
        conv = forms.plain.get_submodule(folded.name)
        assert isinstance(conv, nn.Conv2d)
        layer = errors.get(folded.name)
        regions.append(
            page.Region(
                name=folded.name,
                branches=tuple(_branches(folded)),
                kernel=tuple(conv.kernel_size),
                stride=tuple(conv.stride),
                groups=conv.groups,
                in_channels=conv.in_channels,
                out_channels=conv.out_channels,
                params_before=folded.parameters_before,
                params_after=folded.parameters_after,
                error_made=layer.made_here if layer else None,
                error_arriving=layer.arriving if layer else None,
            )
        )
    return tuple(regions)


def _judgement(judged: _Judged) -> page.Check:
    evidence = judged.evidence
    agreement = evidence.agreement
    return page.Check(
        subject=judged.subject,
        inputs=judged.inputs,
        dtype=evidence.dtype,
        relative_error=evidence.relative,
        absolute_error=evidence.absolute,
        tolerance=evidence.tolerance,
        tolerance_origin=evidence.tolerance_origin,
        passed=evidence.passed,
        reason="; ".join(evidence.reasons) or "within the tolerance",
        reference_error=evidence.reference_error,
        agree=agreement.agreed if agreement else None,
        total=agreement.total if agreement else None,
    )


def _samples(forms: _Forms, data: ImageData) -> tuple[page.Sample, ...]:
    """All digits that the plain form reads wrongly, filled up with others."""
    images, truth = data.val_images(range(data.num_val or 0))
    labels = truth.tolist()
    with torch.inference_mode():
        confidence, predicted = forms.plain(images).softmax(1).max(1)
    order = sorted(range(len(labels)), key=lambda i: (int(predicted[i]) == labels[i], i))
    gray = (data.to_pixels(images)[:, 0] * 255).round().int()
    return tuple(
        page.Sample(tuple(tuple(row) for row in gray[i].tolist()), labels[i], int(predicted[i]), float(confidence[i]))
        for i in order[:_SAMPLES]
    )


def _files(sizes: dict[str, int]) -> tuple[page.File, ...]:
    return tuple(page.File(name, sizes.get(name, 0), purpose) for name, purpose in _PURPOSES.items())


def _next_commands(target: Path) -> tuple[page.NextCommand, ...]:
    train, plain = target / TRAIN_FILE, target / PLAIN_FILE
    return (
        page.NextCommand(f"repvgg verify {train} {plain}", "judge the two forms again, layer by layer"),
        page.NextCommand(f"repvgg convert {train} my-plain.safetensors", "convert the trained model once more"),
        page.NextCommand("repvgg bench repvgg_a0", "time an ImageNet model on this machine, in its three forms"),
    )


def _write(folder: Path, report: page.Report) -> None:
    """Write the report and its page, which name their own sizes: a few rounds until those are right."""
    sizes = {file.name: file.bytes for file in report.files}
    for _ in range(5):
        report = replace(report, files=_files(sizes))
        texts = {JSON_FILE: json.dumps(report.to_dict(), allow_nan=False), HTML_FILE: page.render_quickstart(report)}
        now = sizes | {name: len(text.encode()) for name, text in texts.items()}
        if now == sizes:
            break
        sizes = now
    for name, text in texts.items():
        write_text(folder / name, text)


def _summary(target: Path, report: page.Report, console: Console) -> None:
    plain = report.timing("plain")
    assert plain is not None
    worst = max(report.evidence, key=lambda judgement: judgement.relative_error / judgement.tolerance)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    faster = f"{plain.speedup:.2f} times as fast as the train form"
    table.add_row("held-out accuracy", f"{report.training.accuracy:.2%}")
    table.add_row("equal", f"yes: {worst.relative_error:.1e} at most, {worst.tolerance:.1e} allowed")
    table.add_row("plain form", faster if plain.speedup > 1 else f"NOT faster here: {faster}")
    table.add_row("parameters", f"{report.model.params_train:,} → {report.model.params_plain:,}")
    table.add_row("report", str(target / HTML_FILE))
    console.print()
    console.print(table)
    console.print("\nTry next:")
    for command in report.next_commands:
        console.print(f"  {command.command:72} # {command.purpose}", highlight=False, soft_wrap=True)
