"""``repvgg train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from repvgg.errors import UsageError

if TYPE_CHECKING:
    from repvgg.training import TrainConfig

_TERMINATED = 143  # what a shell calls a program that SIGTERM ended
_OUT = "where the run goes; without it runs/MODEL-RECIPE, or the folder of the config that is resumed."
_SHORT = {"--data": "--data.uri"}


def train(arguments: list[str]) -> int:
    """Train a model by a recipe, with any of its settings changed, and collapse what comes out.

    A run leaves a folder: both forms of the model, the best one, the log, the learning curve, and config.yaml, which
    repeats the run. Killed at any moment and started again with --resume, it ends with the same weights.

        repvgg train repvgg_a0 --recipe paper-simple --data imagefolder:imagenet
        repvgg train repvgg_t1 --recipe cifar --optim.lr 0.05 --epochs 40
        repvgg train --config runs/repvgg_t1-cifar/config.yaml --resume
        torchrun --nproc-per-node 8 -m repvgg train --config b1.yaml --sync-bn

    Recipes: paper-simple, paper-heavy, plus, cifar, finetune, quickstart.

    Args:
        arguments: what stands behind ``repvgg train``.
    """
    parsed = _parse(_spelled_out(arguments))
    from repvgg.training import Terminated, run  # after parsing: the help text needs neither Lightning nor its seconds

    config, folder = parsed.settings, _folder(parsed)
    try:
        run(config, folder, resume=parsed.resume, overwrite=parsed.overwrite)
    except Terminated:
        from repvgg.cli.terminal import write_warning

        write_warning(f"terminated; go on with: repvgg train --config {folder / 'config.yaml'} --resume")
        return _TERMINATED
    return 0


def _spelled_out(arguments: list[str]) -> list[str]:
    """The same with a flag in front of the model, and the whole name of short flags."""
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
    """What the recipe or the config file says, before any flag changes it."""
    from repvgg.training import read_config, recipe_of

    file, recipe = _value_of("--config", arguments), _value_of("--recipe", arguments)
    if file is not None and recipe is not None:
        raise UsageError("A config file holds the whole recipe: give either --config or --recipe.")
    if file is not None:
        return read_config(file)
    if recipe is None and not {"-h", "--help"} & set(arguments):
        raise UsageError("Say how to train: --recipe paper-simple, or another one of 'repvgg train --help'.")
    return recipe_of(recipe or "paper-simple")


def _parse(arguments: list[str]) -> Any:
    from repvgg.cli import description
    from repvgg.training import TrainConfig

    path = Path | None
    switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
    fields: list[tuple[str, Any, Any]] = [
        ("config", Annotated[path, _about("a config.yaml to repeat, instead of a recipe.", "FILE")], None),
        ("out", Annotated[path, _about(_OUT, "FOLDER")], None),
        ("resume", Annotated[switch, _about("go on where the run in the folder was interrupted.")], False),
        ("overwrite", Annotated[switch, _about("begin anew in a folder that holds a run.")], False),
        ("settings", Annotated[TrainConfig, tyro.conf.arg(name="")], _default(arguments)),
    ]
    parsed_type = dataclasses.make_dataclass("TrainArguments", fields, frozen=True)
    return tyro.cli(
        parsed_type,
        prog="repvgg train",
        description=description(train),
        args=arguments,
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


def _about(text: str, metavar: str | None = None) -> Any:
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


def _folder(parsed: Any) -> Path:
    if parsed.out is not None:
        return Path(parsed.out)
    if parsed.resume and parsed.config is not None:
        return Path(parsed.config).parent
    settings = parsed.settings
    model = settings.model or Path(settings.init or "model").stem
    return Path("runs") / f"{model}-{settings.recipe or 'custom'}"
