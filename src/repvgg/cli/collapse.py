"""``repvgg collapse``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repvgg.collapse import Report
    from repvgg.deploy import Shipped
    from repvgg.models import ResolvedModel
    from repvgg.verify import Evidence


def collapse(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    weights: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FILE")] = None,
    num_classes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="CLASSES")] = None,
    input_size: Annotated[tuple[int, int] | None, tyro.conf.arg(help_behavior_hint="", metavar="H W")] = None,
    input_shape: Annotated[tuple[int, int, int] | None, tyro.conf.arg(help_behavior_hint="", metavar="C H W")] = None,
    policy: Literal["cheaper", "always"] = "cheaper",
    report: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FILE.json")] = None,
    overwrite: bool = False,
) -> None:
    """Collapse any network into its plain form, verify it, and write it as .pt2, .onnx or .safetensors.

    The source is timm:NAME, torchvision:NAME, repvgg:NAME (see 'repvgg list'), or PATH.py:FACTORY, a Python file of
    your own: it is imported, that is run, and FACTORY is called without arguments. Nothing is downloaded: without
    --weights, a model by name has random weights.

    The plain form is judged against the source in float64, on random images that make borders count, and so is the
    file that was written, once it is loaded back. What is not equal is not written. Safetensors hold the weights alone.

        repvgg collapse timm:fastvit_t8 plain.pt2 --weights fastvit.safetensors
        repvgg collapse torchvision:resnet50 plain.onnx --input-size 192 256
        repvgg collapse net.py:make_model plain.safetensors --weights run.ckpt

    Args:
        source: where the model comes from.
        out: the file to write; its suffix says which kind.
        weights: trained weights, safetensors or a torch file with a state_dict; they are read as data, never run.
        num_classes: logits of a model by name; without it what the model is made with.
        input_size: height and width of the images that it is exported and judged for; without it what the model says.
        input_shape: the same with the number of channels in front.
        policy: merge what is not dearer than its parts, in multiply-adds and weights at that size, or all that can be.
        report: write all that was folded, left and judged to this file, as JSON.
        overwrite: replace files that exist.
    """
    from repvgg.cli.terminal import busy
    from repvgg.deploy import images_for, ship
    from repvgg.models import resolve
    from repvgg.verify import verify

    _check_arguments(out, report, weights, input_size, input_shape, overwrite)
    with busy("Building"):
        sourced = resolve(
            source, weights=weights, num_classes=num_classes, in_channels=input_shape[0] if input_shape else None
        )
        shape = input_shape or (sourced.input_shape[0], *(input_size or sourced.input_shape[1:]))
        images = images_for(sourced.model, shape)
    _warn(sourced, weights)
    with busy("Collapsing"):
        plain, done = _collapsed(sourced.model, images[0], policy)
    _tell(done, sourced.model, plain)
    with busy("Verifying"):
        evidence = verify(sourced.model, plain, images).raise_if_failed()
    _tell_equal("plain form", evidence, images)
    with busy("Writing"):
        shipped = ship(sourced.model, plain, out, shape, overwrite=overwrite, notes=_notes(sourced))
    _tell_written(shipped, shape)
    if report:
        _write_report(report, sourced, done, evidence, shipped, overwrite)


def _check_arguments(
    out: Path,
    report: Path | None,
    weights: Path | None,
    input_size: tuple[int, int] | None,
    input_shape: tuple[int, int, int] | None,
    overwrite: bool,
) -> None:
    from repvgg._files import check_output
    from repvgg.deploy import check_target
    from repvgg.errors import UsageError

    check_target(out, overwrite=overwrite)
    if report:
        check_output(report, overwrite=overwrite)
        if report.resolve() == out.resolve():
            raise UsageError("The report and the network are two files: give them two names.")
    if weights and any(path and path.resolve() == weights.resolve() for path in (out, report)):
        raise UsageError("The trained weights would be replaced, and they cannot be got back from the plain form.")
    if input_size and input_shape:
        raise UsageError("Give --input-size or --input-shape, not both.")
    if min(input_size or input_shape or (1,)) < 1:
        raise UsageError("Channels, height and width of an image are all at least 1.")


def _warn(sourced: ResolvedModel, weights: Path | None) -> None:
    from repvgg.cli.terminal import write_warning

    if weights is None:
        write_warning(f"no --weights were given: the weights of {sourced.source} are {sourced.weights}")


def _collapsed(model: nn.Module, images: Tensor, policy: Literal["cheaper", "always"]) -> tuple[nn.Module, Report]:
    import warnings

    from repvgg.collapse import reparameterize
    from repvgg.errors import NothingFoldedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)  # the table says it
        return reparameterize(model, images, policy=policy)


def _tell(report: Report, before: nn.Module, after: nn.Module) -> None:
    from repvgg.cli.report_table import write_report
    from repvgg.cli.terminal import write_line

    write_report(report)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (before, after)]
    regions = len(report.folded)
    what = f"{regions} {'region' if regions == 1 else 'regions'} folded" if regions else "nothing to fold, a copy"
    write_line(f"{what}; {counts[0]:,} → {counts[1]:,} parameters")


def _tell_equal(what: str, evidence: Evidence, images: list[Tensor]) -> None:
    from repvgg.cli.terminal import write_line

    sizes = ", ".join(f"{batch.shape[-2]}x{batch.shape[-1]}" for batch in images)
    error = f"relative error {evidence.relative:.1e} in {evidence.dtype}, {evidence.tolerance:.1e} allowed"
    write_line(f"{what} is equal: {error}, on images of {sizes}")


def _notes(sourced: ResolvedModel) -> dict[str, str]:
    """What the file says about itself."""
    from repvgg import __version__

    return {"source": sourced.source, "weights": sourced.weights, "version": __version__}


def _tell_written(shipped: Shipped, shape: tuple[int, int, int]) -> None:
    from repvgg.cli.terminal import write_line

    evidence = shipped.evidence
    if evidence is None:
        write_line(f"wrote {shipped.path}: weights of the plain form, read back bit for bit")
        return
    number = "any number of images" if shipped.dynamic_batch else "one image at a time"
    size = " x ".join(map(str, shape))
    verdict = f"loaded back and equal, relative error {evidence.relative:.1e}, {evidence.tolerance:.1e} allowed"
    write_line(f"wrote {shipped.path}: {number} of {size}, {verdict}")


def _write_report(
    path: Path, sourced: ResolvedModel, report: Report, evidence: Evidence, shipped: Shipped, overwrite: bool
) -> None:
    import json

    from repvgg._files import write_text

    content = {
        **_notes(sourced),
        "out": str(shipped.path),
        "dynamic_batch": shipped.dynamic_batch,
        **report.to_dict(),
        "evidence": evidence.to_dict(),
        "evidence_of_file": shipped.evidence.to_dict() if shipped.evidence else None,
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", overwrite=overwrite)
