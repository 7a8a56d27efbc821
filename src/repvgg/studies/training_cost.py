"""What training a network costs: images a second and memory of whole steps, all networks side by side in rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from repvgg.errors import OtherBlockWarning, UsageError
from repvgg.measure import INTERLEAVED, Call, RunSettings, SpeedProtocol, catch_out_of_memory, held_memory
from repvgg.measure.memory import gpu_peak_bytes
from repvgg.models import ModelSpec
from repvgg.studies.cells import Cells
from repvgg.studies.contenders import Contender
from repvgg.studies.speeds import measure_rounds
from repvgg.training import TrainConfig, classification_loss, seeded
from repvgg.training.optim import build_optimizer

MEMORY = "memory"
_MACHINE = "cost"
_STEPS = 1_000_000  # of a schedule that does not matter
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Cost:
    """What is measured, and how.

    Attributes:
        contenders: side by side.
        spec: the row of models that they are built on.
        config: of the training; its batch is what a step takes.
        image: (C, H, W).
        num_classes: number of logits.
        setting: where.
        rounds: how often each is timed.
    """

    contenders: Sequence[Contender]
    spec: ModelSpec
    config: TrainConfig
    image: tuple[int, int, int]
    num_classes: int
    setting: RunSettings
    rounds: int


def measure_cost(cost: Cost, cells: Cells, machine: Mapping[str, str], on_progress: Callable[[int, int], None]) -> None:
    """Put a cell for each round that is missing, and one with the memory of all.

    A step is forward, loss, backward, and the step of the optimizer, on random images that lie there already.

    Raises:
        UsageError: rounds of another machine are there: times of two machines do not stand beside each other.
    """
    if _MACHINE not in cells:
        cells.put(_MACHINE, dict(machine))
    if dict(cells[_MACHINE]) != dict(machine):
        raise UsageError(
            f"The cost in {str(cells.folder)!r} was measured on another machine, {cells[_MACHINE].get('cpu')}: go on "
            "there, or remove its rounds from the folder of cells."
        )
    names = [contender.name for contender in cost.contenders]
    protocol = SpeedProtocol(rounds=cost.rounds, warmup_seconds=INTERLEAVED.warmup_seconds)
    make = partial(_calls, cost)
    measure_rounds([names], make, cells, cost.setting, protocol, cost.config.batch_size, on_progress)
    if MEMORY not in cells:
        cells.put(MEMORY, {name: _peak(cost, call) for name, call in make(names, lambda name, error: None).items()})


def cost_is_known(cells: Cells, rounds: int) -> bool:
    """Whether nothing of it is missing."""
    return MEMORY in cells and sum(key.startswith("round-") for key in cells.values) >= rounds


def _calls(cost: Cost, names: Sequence[str], on_failure: Callable[[str, Exception], None]) -> Mapping[str, Call]:
    calls: dict[str, Call] = {}
    for contender in cost.contenders:
        if contender.name in names:
            with catch_out_of_memory(contender.name, on_failure):
                calls[contender.name] = training_step(_network(cost, contender), cost)
    return calls


def _network(cost: Cost, contender: Contender) -> nn.Module:
    with warnings.catch_warnings(), seeded("model", cost.config.seed):
        warnings.simplefilter("ignore", OtherBlockWarning)  # the trainings tell it
        model = contender.make(cost.spec, cost.num_classes, cost.image[0])
    layout = torch.channels_last if cost.config.channels_last else torch.contiguous_format
    return model.to(cost.setting.device, memory_format=layout).train()  # type: ignore[call-overload, no-any-return]


def training_step(model: nn.Module, cost: Cost) -> Call:
    """One step of the training of ``config``, again and again on the same random images.

    Gradients are let go of at its end, so that all of its memory is taken within it.
    """
    optimizer, _ = build_optimizer(model, cost.config.optim, _STEPS, 0)
    images, labels = _batch(cost)
    half = _HALF.get(cost.config.precision)

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            with nullcontext() if half is None else torch.autocast(cost.setting.device, half):
                loss = classification_loss(model(images), labels, cost.config.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return step


def _batch(cost: Cost) -> tuple[Tensor, Tensor]:
    count, generator = cost.config.batch_size, torch.Generator().manual_seed(0)
    layout = torch.channels_last if cost.config.channels_last else torch.contiguous_format
    images = torch.randn(count, *cost.image, generator=generator).to(cost.setting.device, memory_format=layout)
    labels = torch.randint(cost.num_classes, (count,), generator=generator).to(cost.setting.device)
    return images, labels


def _peak(cost: Cost, call: Call) -> int:
    """Bytes that a step takes at most, beyond weights, their averages and what the optimizer keeps."""
    call()  # the first makes what the optimizer keeps
    if cost.setting.device == "cuda":
        return gpu_peak_bytes(call)
    return max(step.held for step in held_memory(call))
