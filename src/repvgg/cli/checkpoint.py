"""``repvgg checkpoint inspect`` and ``repvgg checkpoint convert``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from repvgg._files import check_output
from repvgg._progress import busy
from repvgg.cli._options import CheckpointSource, JsonFlag, OutFile
from repvgg.cli._output import equality, write_json, write_line, write_table
from repvgg.errors import UsageError

if TYPE_CHECKING:
    from repvgg.checkpoints import Form
    from repvgg.models import LoadedModel
    from repvgg.verify import Evidence

Target = Literal["repvgg", "upstream", "timm", "mmpretrain"]
_HUB = "hub:"
_HEADER = ("version", "ema", "source", "mean", "std", "classes", "metrics", "recipe", "spec")
_SUFFIXES = (".safetensors", ".pth", ".pt")


def inspect(
    file: CheckpointSource,
    as_json: JsonFlag = False,
) -> None:
    """Show what a checkpoint holds: naming scheme, model, form, header, and tensors that are not used.

    Files of this library, of the paper's authors, of timm and of mmpretrain are recognized by tensor names and shapes.

        repvgg checkpoint inspect RepVGG-A0-train.pth
        repvgg checkpoint inspect hub:timm/repvgg_a0.rvgg_in1k --json

    Args:
        file: safetensors, a torch file, or hub:OWNER/NAME for a repository of the Hugging Face hub.
        as_json: print JSON, with the header and the reason for every tensor that is not used.
    """
    about = _summary(file, _read(file))
    if as_json:
        write_json(about)
        return
    dropped, notes, header = about.pop("dropped"), about.pop("notes"), about.pop("header") or {}
    rows = {**about, "header": "yes" if header else "none", **{f"header.{name}": header[name] for name in header}}
    shown = ((name.replace("_", " "), value) for name, value in rows.items() if value not in ("", (), {}, None))
    write_table([(name, _text(value)) for name, value in shown], numbers=False)
    for name, reason in dropped.items():
        write_line(f"{name} is not used: {reason}")
    for note in notes:
        write_line(f"note: {note}")


def convert(
    file: CheckpointSource,
    out: OutFile,
    to: Target = "repvgg",
    form: Annotated[
        Literal["train", "plain"] | None, tyro.conf.arg(help_behavior_hint="", metavar="{train,plain}")
    ] = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint under the tensor names of another library; values stay the same, bit for bit.

    With --form plain, a checkpoint in the train form is converted and verified before it is written. A safetensors file
    always gets a header; a torch file under another library's names is a bare state dict.

        repvgg checkpoint convert RepVGG-A0-train.pth a0.safetensors
        repvgg checkpoint convert a0.safetensors a0.pth --to timm --form plain

    Args:
        file: safetensors, a torch file, or hub:OWNER/NAME for a repository of the Hugging Face hub.
        out: where to write it; ends in .safetensors, or in .pth or .pt for a torch file.
        to: the naming scheme: repvgg (this library), upstream (the paper's authors), timm or mmpretrain.
        form: train or plain (default: that of the file).
        overwrite: replace OUT if it exists.
    """
    from repvgg.models import save

    _check_output(file, out, overwrite)
    read = _read(file, plain=False if form == "train" else None)
    loaded, evidence = _in_form(read, form)
    save(out, loaded.model, loaded.metadata, layout=to, without=loaded.account.filled, overwrite=overwrite)
    about = loaded.metadata
    if evidence is not None:
        write_line(equality(evidence))
    for name, reason in loaded.account.dropped.items():
        write_line(f"{name} is not used: {reason}")
    write_line(f"wrote {out}: {about.model}, {about.form} form, names of {to} instead of {loaded.account.layout}")


def _read(source: str, *, plain: bool | None = None) -> LoadedModel:
    from repvgg.models import from_pretrained, load

    if source.startswith(_HUB):
        return from_pretrained(source.removeprefix(_HUB), plain=plain)
    return load(source, plain=plain)


def _check_output(file: str, out: Path, overwrite: bool) -> None:
    if out.suffix not in _SUFFIXES:
        raise UsageError(f"A checkpoint is a safetensors or a torch file: end {str(out)!r} in .safetensors or .pth.")
    check_output(out, overwrite=overwrite)
    if out.exists() and Path(file).exists() and out.samefile(file):
        raise UsageError("The output would replace its source: choose another name.")


def _in_form(loaded: LoadedModel, form: Form | None) -> tuple[LoadedModel, Evidence | None]:
    """Return the model in the requested form, with evidence if it had to be converted."""
    from repvgg.models import collapse_loaded
    from repvgg.verify import border_inputs, verify

    about = loaded.metadata
    if form != "plain" or about.form == "plain":
        return loaded, None
    with busy("Converting"):
        plain = collapse_loaded(loaded)
    images = border_inputs((2, about.in_channels, about.input_size, about.input_size), batches=3)
    with busy("Verifying"):
        return plain, verify(loaded.model, plain.model, images).raise_if_failed()


def _summary(file: str, loaded: LoadedModel) -> dict[str, Any]:
    metadata, account = loaded.metadata, loaded.account
    parameters = list(loaded.model.parameters())
    return {
        "file": file,
        "names": account.layout,
        "section": account.section,
        "prefix": account.prefix,
        "model": metadata.model,
        "form": metadata.form,
        "num_classes": metadata.num_classes,
        "in_channels": metadata.in_channels,
        "input_size": metadata.input_size,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "used": len(account.used),
        "filled": len(account.filled),
        "dropped": account.dropped,
        "notes": list(account.notes),
        "header": {name: value for name, value in asdict(metadata).items() if name in _HEADER}
        if account.header
        else None,
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
