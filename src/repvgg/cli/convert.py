"""``repvgg convert``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Collapse a trained checkpoint into its plain form, verify it, and only then write it.

    The plain form is judged against the trained one in float64, on random images that make borders count, at the
    input size of the checkpoint and at two odd ones. What is not equal is not written.

    Args:
        source: the trained checkpoint: safetensors, or a torch file with a state_dict.
        target: where to write the plain form, a .safetensors file.
        model: the model that the checkpoint must be of, a name from 'repvgg list'.
        overwrite: replace the target if it exists.
    """
    from rich.console import Console

    from repvgg.collapse import reparameterize
    from repvgg.errors import CheckpointError, UsageError
    from repvgg.files import check_output
    from repvgg.models import RepVGG, load, save
    from repvgg.verify import border_inputs, verify

    if target.suffix != ".safetensors":
        raise UsageError(f"The plain form is written as safetensors: end {str(target)!r} in .safetensors.")
    check_output(target, overwrite=overwrite)
    loaded = load(source, model)
    about = loaded.metadata
    if about.form == "plain":
        raise CheckpointError(f"{str(source)!r} is in the plain form already: there is nothing to convert.")
    plain, report = reparameterize(loaded.model)
    assert isinstance(plain, RepVGG)
    images = border_inputs((2, about.in_channels, about.input_size, about.input_size), batches=3)
    evidence = verify(loaded.model, plain, images).raise_if_failed()
    save(target, plain, replace(about, form="plain"), overwrite=overwrite)
    console = Console(highlight=False)
    console.print(report)
    console.print(f"{about.model} → {target}, equal: {evidence}")
