"""``repvgg convert``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from repvgg.cli.proving import in_words, proven

if TYPE_CHECKING:
    from repvgg.collapse import Report
    from repvgg.models import RepVGG
    from repvgg.verify import Evidence


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    overwrite: bool = False,
) -> None:
    """Collapse a trained checkpoint into its plain form, verify it, and only then write it.

    The plain form is judged against the trained one in float64, on random images that make borders count, at the
    input size of the checkpoint and at two odd ones. What is not equal is not written.

        repvgg convert run.ckpt plain.safetensors

    Args:
        source: the trained checkpoint: safetensors, or a torch file with a state_dict.
        target: where to write the plain form, a .safetensors file.
        model: the model that the checkpoint must be of, a name from 'repvgg list'.
        overwrite: replace the target if it exists.
    """
    from repvgg.cli.terminal import busy
    from repvgg.collapse import reparameterize
    from repvgg.models import RepVGG, load, save

    _check_target(target, overwrite)
    loaded = load(source, model)
    about = loaded.metadata
    _check_source(source, target, about.form)
    with busy("Collapsing"):
        plain, report = reparameterize(loaded.model)
    assert isinstance(plain, RepVGG)
    evidence = proven(loaded, plain)
    save(target, plain, replace(about, form="plain"), overwrite=overwrite)
    _tell(report, evidence)
    _tell_outcome(about.model, loaded.model, plain, target)


def _check_target(target: Path, overwrite: bool) -> None:
    from repvgg._files import check_output
    from repvgg.errors import UsageError

    if target.suffix != ".safetensors":
        raise UsageError(f"The plain form is written as safetensors: end {str(target)!r} in .safetensors.")
    check_output(target, overwrite=overwrite)


def _check_source(source: Path, target: Path, form: str) -> None:
    from repvgg.errors import CheckpointError, UsageError

    if form == "plain":
        raise CheckpointError(f"{str(source)!r} is in the plain form already: there is nothing to convert.")
    if target.exists() and source.samefile(target):
        raise UsageError("The plain form would replace the trained checkpoint, which cannot be got back from it.")


def _tell(report: Report, evidence: Evidence) -> None:
    """A line a block, then the verdict."""
    from repvgg.cli.terminal import write_line, write_table

    parts = [" + ".join(part.name or part.description for part in region.parts) for region in report.folded]
    folded = zip(report.folded, parts, strict=True)
    write_table([(region.name, text, f"→ {region.convolution}") for region, text in folded], numbers=False)
    for row in (*report.left, *report.dropped):
        write_line(f"{row.name} is not in the plain form: {row.reason}")
    agreement = evidence.agreement
    same = f"; {agreement.agreed} of {agreement.total} predictions agree" if agreement else ""
    write_line(f"{in_words(evidence)}{same}")


def _tell_outcome(name: str, train: RepVGG, plain: RepVGG, target: Path) -> None:
    from repvgg.cli.terminal import write_line

    before, after = (sum(p.numel() for p in form.parameters()) for form in (train, plain))
    write_line(f"wrote {target}: {name}, plain form, {after:,} parameters instead of {before:,}")
