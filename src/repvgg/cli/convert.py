"""``repvgg convert``, also called ``repvgg collapse``."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from repvgg._files import atomic_write, check_output, write_text
from repvgg._progress import busy
from repvgg.cli._network import Network, load_network, plain_form, warn_of_random_weights
from repvgg.cli._options import InputHeightWidth, OptionalFile, OutFile
from repvgg.cli._output import equality, write_line, write_report
from repvgg.errors import CheckpointError, ExportError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from repvgg.collapse import Report
    from repvgg.deploy import Shipped
    from repvgg.verify import Evidence


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: OutFile,
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    weights: OptionalFile = None,
    num_classes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="CLASSES")] = None,
    input_size: InputHeightWidth = None,
    input_shape: Annotated[tuple[int, int, int] | None, tyro.conf.arg(help_behavior_hint="", metavar="C H W")] = None,
    policy: Literal["cheaper", "always"] = "cheaper",
    report: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="", metavar="FILE.json")] = None,
    overwrite: bool = False,
) -> None:
    """Convert any network into its plain form, verify it, and write it as .safetensors, .pt2 or .onnx.

    SOURCE is a trained checkpoint of a RepVGG (safetensors, or a torch file with a state_dict), in the plain form to
    export it, hub:OWNER/NAME for one
    on the Hugging Face hub, timm:NAME, torchvision:NAME, repvgg:NAME (see 'repvgg list'), or PATH.py:FACTORY for your
    Python file: the file is executed, and FACTORY is called without arguments. Models by name are not downloaded:
    without --weights, their weights are random.

    The plain form is compared with the source in float64, on random images that reveal differences at borders, at the
    input size and at two odd ones; so is the written file, after loading it again. A file that differs is removed. A
    .safetensors file holds only the weights; that of a checkpoint keeps its header.

        repvgg convert run.ckpt plain.safetensors
        repvgg convert timm:fastvit_t8 plain.pt2 --weights fastvit.safetensors
        repvgg convert torchvision:resnet50 plain.onnx --input-size 192 256
        repvgg convert net.py:make_model plain.safetensors --weights run.ckpt

    Args:
        source: where the model comes from.
        out: the file to write; its suffix determines the format.
        model: refuse a checkpoint of any other model, a name from 'repvgg list'.
        weights: trained weights of a model by name or factory, safetensors or a torch file with a state_dict; they are
            read as data, never executed.
        num_classes: logits of a model by name (default: the model's own).
        input_size: height and width of the images for costs, verification and export (default: the model's own).
        input_shape: the same with the number of channels in front.
        policy: merge only where that takes no more multiply-adds and weights than the parts at that size ("cheaper"),
            or wherever it is possible ("always").
        report: write what was folded, skipped and verified to this file, as JSON.
        overwrite: replace files that exist.
    """
    from repvgg.deploy import images_for
    from repvgg.verify import verify

    _check_outputs(source, out, report, weights, overwrite)
    if input_size and input_shape:
        raise UsageError("Give --input-size or --input-shape, not both.")
    if min(input_size or input_shape or (1,)) < 1:
        raise UsageError("Channels, height and width of an image are all at least 1.")
    with busy("Loading"):
        network = load_network(source, model, weights, num_classes, input_size, input_shape)
        if network.metadata and network.metadata.form == "plain" and out.suffix == ".safetensors":
            raise CheckpointError(
                f"{source!r} is in the plain form already: copy it, or name an output that ends in .onnx or .pt2."
            )
        images = images_for(network.model, network.shape)
    warn_of_random_weights(network, weights)
    plain, folded = plain_form(network, images[0], policy)
    with busy("Verifying"):
        evidence = verify(network.model, plain, images).raise_if_failed()
    with busy("Writing"):
        shipped = _write(network, plain, out, overwrite)
        if report:
            _write_report_file(report, network, folded, evidence, shipped, overwrite)
    # Last, so that a failure of any step above prints its one sentence only.
    _write_summary(folded, network.model, plain)
    write_line(f"plain form is {equality(evidence, images)}")
    write_line(f"wrote {out}: {_contents(network, shipped)}")


def _check_outputs(source: str, out: Path, report: Path | None, weights: Path | None, overwrite: bool) -> None:
    from repvgg.deploy import check_target

    # First: with --overwrite the other checks would let a source be replaced.
    if any(
        path and os.path.exists(path) and os.path.exists(source) and path.samefile(source) for path in (out, report)
    ):
        raise UsageError("The plain form would replace the trained checkpoint, which cannot be recovered from it.")
    check_target(out, overwrite=overwrite)
    if report:
        check_output(report, overwrite=overwrite)
        if report.resolve() == out.resolve():
            raise UsageError("The report and the network are two files: give them two names.")
    if weights and any(path and path.resolve() == weights.resolve() for path in (out, report)):
        raise UsageError("The trained weights would be replaced, and cannot be recovered from the plain form.")


def _write_summary(report: Report, before: nn.Module, after: nn.Module) -> None:
    write_report(report)
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (before, after)]
    regions = len(report.folded)
    what = f"{regions} {'region' if regions == 1 else 'regions'} folded" if regions else "nothing to fold, a copy"
    write_line(f"{what}; {parameters[0]:,} → {parameters[1]:,} parameters")


def _write(network: Network, plain: nn.Module, out: Path, overwrite: bool) -> Shipped:
    from repvgg.deploy import Shipped, ship
    from repvgg.models import RepVGG, load, save

    if network.metadata is None or out.suffix != ".safetensors":
        return ship(network.model, plain, out, network.shape, overwrite=overwrite, notes=network.notes_in_file)
    assert isinstance(plain, RepVGG)
    with atomic_write(out, overwrite=overwrite) as part:
        save(part, plain, replace(network.metadata, form="plain"))
        written, wanted = load(part).model.state_dict(), plain.state_dict()
        if written.keys() != wanted.keys() or not all(written[name].equal(wanted[name].cpu()) for name in wanted):
            raise ExportError("The written file differs from the model: try again, or write to another disk.")
    return Shipped(out)


def _contents(network: Network, shipped: Shipped) -> str:
    if shipped.evidence is None:
        if network.metadata is None:
            return "weights of the plain form, read back bit for bit"
        return f"{network.metadata.model}, plain form, weights and header, read back bit for bit"
    number = "any number of images" if shipped.dynamic_batch else "one image at a time"
    size = " x ".join(map(str, network.shape))
    error = f"relative error {shipped.evidence.relative:.1e}, {shipped.evidence.tolerance:.1e} allowed"
    return f"{number} of {size}, loaded back and equal, {error}"


def _write_report_file(
    path: Path, network: Network, report: Report, evidence: Evidence, shipped: Shipped, overwrite: bool
) -> None:
    content = {
        **network.notes,
        "out": str(shipped.path),
        "dynamic_batch": shipped.dynamic_batch,
        **report.to_dict(),
        "evidence": evidence.to_dict(),
        "evidence_of_file": shipped.evidence.to_dict() if shipped.evidence else None,
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", overwrite=overwrite)
