"""``repvgg train``."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from repvgg.cli._interrupt import interrupt_message
from repvgg.cli._options import description, option, parse
from repvgg.cli._output import write_line, write_warning
from repvgg.cli._quantized_run import write_int8
from repvgg.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from repvgg.training import TrainConfig

_TERMINATED = 143  # what shells report for a program ended by SIGTERM
_OUT = "folder of the run (default: runs/MODEL-RECIPE, or that of the config that is resumed)."
_CHOOSE = "Choose a recipe: --recipe paper-simple, or another one of 'repvgg train --help'."
_SHORT = {"--data": "--data.uri", "--val": "--data.val", "--qat": "--qat.enabled"}


def train(arguments: list[str]) -> int:
    """Train a model by a recipe, with any setting changed, and convert the result into its plain form.

    A run writes a folder: both forms of the model, the best checkpoint, the log, the learning curve, a page to open in
    a browser (report.html), and config.yaml, which repeats the run. A run that is killed and started again with
    --resume ends with the same weights.

        repvgg train repvgg_a0 --recipe paper-simple --data imagefolder:imagenet
        repvgg train repvgg_t1 --recipe cifar --optim.lr 0.05 --epochs 40
        repvgg train pspnet_repvgg_a0 --recipe pspnet-small --data masks:camvid
        repvgg train --config runs/repvgg_t1-cifar/config.yaml --resume
        repvgg train --recipe qat --init a0.safetensors --data imagefolder:photos
        torchrun --nproc-per-node 8 -m repvgg train --config b1.yaml --sync-bn

    Recipes: paper-simple, paper-heavy, plus, cifar, cifar-paper, finetune, qat, quickstart; for images with
    masks pspnet, pspnet-small.

    Args:
        arguments: everything after ``repvgg train``.
    """
    again = shlex.join(["repvgg", "train", *arguments])
    with interrupt_message(lambda: f"interrupted; start again with: {again}"):  # the imports alone take seconds
        return _train(arguments, again)


def _train(arguments: list[str], again: str) -> int:
    parsed = _parse(_spelled_out(arguments))
    from repvgg.training import CONFIG_FILE, Terminated, run  # after parsing: the help text needs no Lightning

    config, folder = parsed.settings, _folder(parsed)
    resume = shlex.join(["repvgg", "train", "--config", str(folder / CONFIG_FILE), "--resume"])

    def next_step() -> str:
        return f"continue with: {resume}" if (folder / CONFIG_FILE).exists() else f"start again with: {again}"

    try:
        with interrupt_message(lambda: f"interrupted; {next_step()}"):
            result = run(config, folder, resume=parsed.resume, overwrite=parsed.overwrite)
            if result is not None:  # on rank 0
                if result.network is not None:
                    write_int8(folder, result.network, result.fit.config)
                _write_page(folder)
    except Terminated:
        write_warning(f"terminated; {next_step()}")
        return _TERMINATED
    return 0


def _write_page(folder: Path) -> None:
    from repvgg.studies.report.run_page import write_run_page

    try:
        write_line(f"  report: {write_run_page(folder)}")
    except MissingDependencyError as error:  # the run is complete without it
        write_warning(f"no report.html was written: {error}")


def _spelled_out(arguments: list[str]) -> list[str]:
    """Put ``--model`` in front of a positional model, and replace short flags by their full names."""
    out = []
    for index, argument in enumerate(arguments):
        if index == 0 and not argument.startswith("-"):
            out.append("--model")
        name, equals, value = argument.partition("=")
        out.append(_SHORT.get(name, name) + equals + value)
    return out


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else next(iter(arguments[index + 1 :]), None)
    return None


def _default(arguments: list[str]) -> TrainConfig:
    """Return the config of the recipe or file that the arguments name, before flags change it."""
    from repvgg.training import read_config, recipe_of

    file, recipe = _value_of("--config", arguments), _value_of("--recipe", arguments)
    if file is not None and recipe is not None:
        raise UsageError("A config file holds the whole recipe: give either --config or --recipe.")
    if file is not None:
        return read_config(file)
    if recipe is None and "--recipe" in arguments:  # without a value
        raise UsageError(_CHOOSE)
    return recipe_of(recipe or "paper-simple")  # the default for help, and for errors in other arguments


def _parse(arguments: list[str]) -> Any:
    from repvgg.training import TrainConfig

    path = Path | None
    switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
    fields: list[tuple[str, Any, Any]] = [
        ("config", Annotated[path, option("a config.yaml to repeat, instead of a recipe.", "FILE")], None),
        ("out", Annotated[path, option(_OUT, "FOLDER")], None),
        ("resume", Annotated[switch, option("continue the interrupted run in the folder.")], False),
        ("overwrite", Annotated[switch, option("replace the run that the folder holds.")], False),
        ("settings", Annotated[TrainConfig, tyro.conf.arg(name="")], _default(arguments)),
    ]
    parsed_type = dataclasses.make_dataclass("TrainArguments", fields, frozen=True)
    parsed = parse(
        parsed_type,
        arguments,
        prog="repvgg train",
        description=description(train),
        config=(tyro.conf.HelptextFromCommentsOff,),
    )
    if parsed.config is None and _value_of("--recipe", arguments) is None:
        raise UsageError(_CHOOSE)
    return parsed


def _folder(parsed: Any) -> Path:
    if parsed.out is not None:
        return Path(parsed.out)
    if parsed.resume and parsed.config is not None:
        return Path(parsed.config).parent
    settings = parsed.settings
    model = settings.model or Path(settings.init or "model").stem
    return Path("runs") / f"{model}-{settings.recipe or 'custom'}"
