"""Train, collapse, verify, export and time a small network on scanned digits, and write a report.

    repvgg quickstart

Expected: at least 99.0 % of the 360 validation digits, every check passed, within a minute on 2 cores.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from repvgg import collapse, measure, models
from repvgg._files import write_text
from repvgg._serde import to_json
from repvgg.data import ImageData, open_image_data
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.errors import EquivalenceError, ExportError, OutputError, OutputExistsError
from repvgg.studies.report import schema as page
from repvgg.studies.report.render import render_quickstart
from repvgg.training import FitResult, TrainConfig, fit, quickstart, seeded
from repvgg.verify import Evidence, border_inputs, verify

MODEL = "repvgg_t0"
FOLDER = Path("runs/quickstart")
TRAIN_FILE, PLAIN_FILE, ONNX_FILE = "train.safetensors", "plain.safetensors", "plain.onnx"
JSON_FILE, HTML_FILE = "report.json", "report.html"
_BATCH = 64
_SAMPLES = 24  # fills whole rows of the page's grid on a desktop (8) and on a phone (4)
_PURPOSES = {
    TRAIN_FILE: "the trained model with its branches: train it further, or convert it again",
    PLAIN_FILE: "the plain model, one convolution per block: deploy this one",
    ONNX_FILE: "the plain model for ONNX Runtime and other tools that read ONNX",
    JSON_FILE: "every number of this page, for programs",
    HTML_FILE: "this page",
}


@dataclass(frozen=True, eq=False)
class _Forms:
    """The trained network in its three forms, and the report of the collapse."""

    train: models.RepVGG
    folded: nn.Module
    plain: models.RepVGG
    report: collapse.Report


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Batches to verify on, and what to call them."""

    name: str
    batches: list[Tensor]


@dataclass(frozen=True, eq=False)
class _CheckResult:
    """A comparison with the train form in float64."""

    subject: str
    inputs: str
    evidence: Evidence


def run(out: Path | None = None, seed: int = 0, *, overwrite: bool = False, console: Console | None = None) -> Path:
    """Run all steps, and write a folder with the models and a report.

    The folder is created atomically: an interrupted run leaves nothing.

    Args:
        out: the folder; default: ``runs/quickstart``, or ``runs/quickstart-2``, … if it exists.
        seed: of the initial weights, the order of the images and their augmentation.
        overwrite: replace ``out`` if it exists.
        console: shows the progress; default: standard output.

    Returns:
        The folder.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is not set.
        EquivalenceError: a converted model is not equal to the trained one.
    """
    console = console or Console()
    target = _unused_name(FOLDER) if out is None else out
    with _atomic_folder(target, overwrite) as folder:
        config = quickstart(seed)
        data = open_image_data(config.data, seed=seed)
        trained, result = _train(data, config, console)
        forms = _collapse(trained, console)
        checks = _verify(forms, data, console)
        _save(folder, forms, data, result)
        onnx = _export(folder, forms, data, console)
        checks += [_check("Plain form, ONNX Runtime", _validation_inputs(data), forms.train, onnx, console)]
        timings = _time(forms, onnx, data, console)
        report = _build_report(target, folder, seed, data, result, forms, checks, timings)
        _write_report(folder, report)
    _print_summary(target, report, console)
    return target


def _unused_name(folder: Path) -> Path:
    """Return ``folder``, or the first of ``folder-2``, ``folder-3``, … that does not exist."""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


@contextmanager
def _atomic_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``, renamed to it on success and removed on failure."""
    if target.exists() and not (overwrite and target.is_dir()):
        raise OutputExistsError(f"{str(target)!r} exists: add --overwrite, or choose another folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be created: {error.strerror or error}.") from error
    try:
        yield folder
        # mkdtemp makes a folder that only its owner can read; this one gets the permissions of its parent.
        folder.chmod(target.parent.stat().st_mode & 0o777)
        _replace_folder(folder, target)
    except OSError as error:
        raise OutputError(f"{str(target)!r} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_folder(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``, and remove the folder that was there."""
    if not target.exists():
        folder.replace(target)
        return
    # A rename cannot replace a folder that is not empty: move the old one aside, and back if the second rename fails.
    previous = folder.with_name(f"{folder.name}-previous")
    target.replace(previous)
    try:
        folder.replace(target)
    except BaseException:
        previous.replace(target)
        raise
    shutil.rmtree(previous)


def _train(data: ImageData, config: TrainConfig, console: Console) -> tuple[models.RepVGG, FitResult]:
    console.print(f"[bold]Train[/] {MODEL} on {data.num_train} digits, validate on {data.num_val} others")
    with seeded("model", config.seed):  # the same weights whatever was drawn before
        model = models.create_model(models.spec_of(MODEL), len(data.classes), data.input_shape[0])
    result = fit(model, data, config, console=console)
    console.print(f"  {result.accuracy:.2%} of the validation digits are correct, after {result.seconds:.0f} s")
    return model, result


def _collapse(model: models.RepVGG, console: Console) -> _Forms:
    plain, report = collapse.reparameterize(model)
    folded, _ = collapse.fold_batch_norms(model)
    assert isinstance(plain, models.RepVGG)
    console.print("[bold]Collapse[/] every block into one convolution")
    for region in report.folded:
        branches = ", ".join(_describe_branches(region))
        console.print(f"  {region.name:16} {branches} → {region.convolution}", highlight=False, soft_wrap=True)
    return _Forms(model, folded, plain, report)


def _describe_branches(region: collapse.Folded) -> list[str]:
    """Return a description of each branch, such as ``3x3 conv + BN``: the layers of each child of the block."""
    short = {"PointwiseConv2d": "conv", "Conv2d": "conv", "BatchNorm2d": "BN"}
    layers: dict[str, dict[str, str]] = {}  # by branch, and by layer, which may be several parts
    for part in region.parts:
        if part.name.startswith(f"{region.name}."):  # the sums of the branches have other names
            branch, _, layer = part.name.removeprefix(f"{region.name}.").partition(".")
            layers.setdefault(branch, {})[layer] = part.description
    descriptions = []
    for of_branch in layers.values():
        text = " + ".join(of_branch.values())
        for name, word in short.items():
            text = text.replace(name, word)
        descriptions.append(text if "conv" in text else f"identity + {text}")
    return descriptions


def _validation_inputs(data: ImageData) -> _Inputs:
    batches = [data.prepare(images) for images, _ in data.val_batches(_BATCH)]
    return _Inputs(f"{data.num_val} validation images", batches)


def _verify(forms: _Forms, data: ImageData, console: Console) -> list[_CheckResult]:
    console.print("[bold]Verify[/] against the trained model in float64")
    channels, height, width = data.input_shape
    validation = _validation_inputs(data)
    border = _Inputs("random images that emphasize the border", border_inputs((16, channels, height, width), batches=3))
    return [
        _check("Plain form", validation, forms.train, forms.plain, console),
        _check("Plain form", border, forms.train, forms.plain, console),
        _check("Batch norms folded", validation, forms.train, forms.folded, console),
    ]


def _check(
    subject: str, inputs: _Inputs, reference: nn.Module, candidate: Callable[[Tensor], Tensor], console: Console
) -> _CheckResult:
    """Compare ``candidate`` with ``reference``.

    Raises:
        EquivalenceError: the error is above the tolerance, or a prediction differs.
    """
    evidence = verify(reference, candidate, inputs.batches).raise_if_failed()
    agreement = evidence.agreement
    same = f", {agreement.agreed}/{agreement.total} predictions agree" if agreement else ""
    error = f"relative error {evidence.relative:.1e}, tolerance {evidence.tolerance:.1e}"
    console.print(f"  {subject}, {inputs.name}: {error}{same}", highlight=False, soft_wrap=True)
    # verify() accepts other predictions within the tolerance, as of ties; a showcase should have none.
    if agreement and agreement.agreed != agreement.total:
        different = agreement.total - agreement.agreed
        raise EquivalenceError(f"{subject}: {different} predictions differ on {inputs.name}.")
    return _CheckResult(subject, inputs.name, evidence)


def _save(folder: Path, forms: _Forms, data: ImageData, result: FitResult) -> None:
    about = {
        "input_size": data.input_shape[1],
        "mean": data.mean,
        "std": data.std,
        "classes": data.classes,
        "recipe": asdict(result.config),
        "metrics": {"held_out_accuracy": result.accuracy},  # the key that readers of checkpoints know
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
    # As many threads as PyTorch uses, or the timings would not compare.
    return OnnxRunner(folder / ONNX_FILE, threads=torch.get_num_threads())


def _time(forms: _Forms, onnx: OnnxRunner, data: ImageData, console: Console) -> list[page.Timing]:
    console.print(f"[bold]Time[/] the forms side by side, batches of {_BATCH}")
    images, _ = data.val_images(range(_BATCH))
    candidates: dict[str, tuple[page.Role, Callable[[Tensor], object]]] = {
        "Train form": ("train", forms.train),
        "Batch norms folded": ("folded", forms.folded),
        "Plain form": ("plain", forms.plain),
        "Plain form, ONNX Runtime": ("runtime", onnx),
    }
    timings = []
    for timing in measure.compare({name: partial(model, images) for name, (_, model) in candidates.items()}):
        timings.append(
            page.Timing(
                name=timing.name,
                role=candidates[timing.name][0],
                median_seconds=timing.median_seconds,
                q1_seconds=timing.q1,
                q3_seconds=timing.q3,
                speedup=timing.ratio_to_baseline,
                speedup_q1=timing.ratio_q1,
                speedup_q3=timing.ratio_q3,
                batch=_BATCH,
                rounds=timing.rounds,
            )
        )
        console.print(f"  {timing}", highlight=False, soft_wrap=True)
    return timings


def _build_report(
    target: Path,
    folder: Path,
    seed: int,
    data: ImageData,
    result: FitResult,
    forms: _Forms,
    checks: list[_CheckResult],
    timings: list[page.Timing],
) -> page.Report:
    shape = (1, *data.input_shape)
    cost_train, cost_plain = measure.count(forms.train, shape), measure.count(forms.plain, shape)
    history = tuple(page.Epoch(e.epoch, e.loss, e.score, e.held_out_loss) for e in result.history)
    train, plain = target / TRAIN_FILE, target / PLAIN_FILE
    return page.Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"repvgg quickstart --seed {seed}",
        seed=seed,
        model=page.Model(
            name=MODEL,
            num_classes=len(data.classes),
            in_channels=data.input_shape[0],
            input_size=data.input_shape[1],
            params_train=cost_train.params,
            params_plain=cost_plain.params,
            macs_train=cost_train.macs,
            macs_plain=cost_plain.macs,
        ),
        data=page.Data(data.uri, data.num_train or 0, data.num_val or 0, data.classes),
        training=page.Training(
            epochs=len(history),
            seconds=result.seconds,
            history=history,
            accuracy=result.accuracy,
            confusion=tuple(tuple(row) for row in result.validation.confusion.tolist()),
        ),
        regions=_regions(forms, checks[0].evidence),
        left=tuple(page.Unchanged(row.name, row.reason) for row in (*forms.report.left, *forms.report.dropped)),
        evidence=tuple(map(_check_entry, checks)),
        timings=tuple(timings),
        samples=_samples(forms, data),
        files=_files({path.name: path.stat().st_size for path in folder.iterdir()}),
        next_commands=(
            page.NextCommand(f"repvgg verify {train} {plain}", "verify the two forms again, layer by layer"),
            page.NextCommand(f"repvgg convert {train} my-plain.safetensors", "convert the trained model yourself"),
            page.NextCommand("repvgg bench repvgg_a0", "time an ImageNet model on this machine, in its three forms"),
        ),
        environment=measure.environment(),
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
                branches=tuple(_describe_branches(folded)),
                kernel=tuple(conv.kernel_size),
                stride=tuple(conv.stride),
                groups=conv.groups,
                in_channels=conv.in_channels,
                out_channels=conv.out_channels,
                params_before=folded.parameters_before,
                params_after=folded.parameters_after,
                error_made=layer.own_error if layer else None,
                error_arriving=layer.accumulated_error if layer else None,
            )
        )
    return tuple(regions)


def _check_entry(check: _CheckResult) -> page.Check:
    evidence = check.evidence
    agreement = evidence.agreement
    return page.Check(
        subject=check.subject,
        inputs=check.inputs,
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
    """Return 24 validation digits, first the ones that the plain form misclassifies."""
    images, truth = data.val_images(range(data.num_val or 0))
    labels = truth.tolist()
    with torch.inference_mode():
        confidence, predicted = forms.plain(images).softmax(1).max(1)
    order = sorted(range(len(labels)), key=lambda i: (int(predicted[i]) == labels[i], i))
    # The page shows gray values: the first channel of images that are gray already.
    gray = (data.to_pixels(images)[:, 0] * 255).round().int()
    return tuple(
        page.Sample(tuple(tuple(row) for row in gray[i].tolist()), labels[i], int(predicted[i]), float(confidence[i]))
        for i in order[:_SAMPLES]
    )


def _files(sizes: dict[str, int]) -> tuple[page.File, ...]:
    return tuple(page.File(name, sizes.get(name, 0), purpose) for name, purpose in _PURPOSES.items())


def _write_report(folder: Path, report: page.Report) -> None:
    """Write ``report.json`` and ``report.html``, which list their own sizes."""
    sizes = {file.name: file.bytes for file in report.files}
    for _ in range(5):  # a size may get another digit, which changes the size again; two rounds are enough in practice
        report = replace(report, files=_files(sizes))
        texts = {JSON_FILE: to_json(report, indent=None), HTML_FILE: render_quickstart(report)}
        new_sizes = sizes | {name: len(text.encode()) for name, text in texts.items()}
        if new_sizes == sizes:
            break
        sizes = new_sizes
    for name, text in texts.items():
        write_text(folder / name, text)


def _print_summary(target: Path, report: page.Report, console: Console) -> None:
    plain = report.timing("plain")
    assert plain is not None
    worst = max(report.evidence, key=lambda check: check.relative_error / check.tolerance)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    speedup = f"{plain.speedup:.2f} times as fast as the train form"
    table.add_row("validation accuracy", f"{report.training.accuracy:.2%}")
    table.add_row("equal", f"yes: error at most {worst.relative_error:.1e}, tolerance {worst.tolerance:.1e}")
    table.add_row("plain form", speedup if plain.speedup > 1 else f"NOT faster here: {speedup}")
    table.add_row("parameters", f"{report.model.params_train:,} → {report.model.params_plain:,}")
    table.add_row("report", str(target / HTML_FILE))
    console.print()
    console.print(table)
    console.print("\nTry next:")
    for command in report.next_commands:
        # Soft wrapping: rich must not break a command that somebody copies.
        console.print(f"  {command.command:72} # {command.purpose}", highlight=False, soft_wrap=True)
