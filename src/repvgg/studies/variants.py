"""Variants of a network that the ablations compare: training one, collapsing it, and the cost of its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from repvgg import __version__
from repvgg.blocks import BLOCKS, Geometry, create_block
from repvgg.collapse import reparameterize
from repvgg.data import ImageData
from repvgg.errors import (
    BorderError,
    NothingFoldedWarning,
    OtherBlockWarning,
    OutputError,
    UsageError,
    did_you_mean,
)
from repvgg.measure import (
    INTERLEAVED,
    Call,
    OnFailure,
    RunSettings,
    SpeedProtocol,
    catch_out_of_memory,
    environment,
    held_memory,
)
from repvgg.measure.memory import gpu_peak_bytes, track_peak_memory
from repvgg.models import ModelSpec, RepVGG, Stage, create_variant, form_of, residual_reorg, spec_of
from repvgg.studies.paper import TABLE_6, TABLE_7
from repvgg.studies.store import Cell, CellStore
from repvgg.studies.timing import measure_rounds
from repvgg.training import Evaluation, TrainConfig, seeded
from repvgg.training.optim import build_optimizer
from repvgg.training.records import Record
from repvgg.verify import verify

# Names of repvgg.training that need Lightning are imported where they are used, so that listing the studies is fast.

#: Takes the architecture, the number of classes and of input channels; returns a freshly initialized network.
Make: TypeAlias = Callable[[ModelSpec, int, int], nn.Module]

FULL = "repvgg"  # the variant that all others are compared with

#: RepVGG-B0 for 32x32 images and little time: all of its 28 layers, a quarter of its widths, no stride in the stem.
SMALL_B0 = ModelSpec(
    "b0-small",
    Stage(1, 16, stride=1),
    (Stage(4, 16), Stage(6, 32), Stage(16, 64), Stage(1, 320)),
    input_size=32,
    source="RepVGG-B0 (CVPR 2021, Table 2) made small for studies",
)


@dataclass(frozen=True)
class Variant:
    """A network to train."""

    name: str  # in files, and for `--rows`
    title: str  # as the paper prints it
    make: Make  # builds it on an architecture
    top1_percent: float | None = None  # on ImageNet-1K, as the paper prints it for RepVGG-B0; None if it does not
    identity: bool | None = None  # whether its blocks have an identity branch; None if the table has no such column
    pointwise: bool | None = None  # the same for the 1x1 branch


def _make(block: str, spec: ModelSpec, num_classes: int, in_channels: int) -> nn.Module:
    return create_variant(spec, block, num_classes, in_channels)


_BLOCK_WITH = {  # (identity, pointwise)
    (False, False): "conv_bn",
    (True, False): "repvgg_no_pointwise",
    (False, True): "repvgg_no_identity",
    (True, True): FULL,
}

#: The rows of Table 6, in its order.
TABLE_6_VARIANTS = tuple(
    Variant(block, BLOCKS[block].title, partial(_make, block), row.top1_percent, row.identity, row.pointwise)
    for row in TABLE_6
    for block in (_BLOCK_WITH[row.identity, row.pointwise],)
)

#: The rows of Table 7, in its order.
TABLE_7_VARIANTS = tuple(
    Variant(
        row.name,
        row.title,
        # Residual Reorg has shortcuts across blocks, so it needs another network class.
        residual_reorg if row.name == "residual_reorg" else partial(_make, row.name),
        row.top1_percent,
    )
    for row in TABLE_7
)

#: Blocks that are equal to another one if their kernels are 3x3.
EQUAL_AT_3X3 = {"replk": "repvgg_no_identity", "expand_ck": "conv_bn", "qarepvgg_s2": "repvgg_identity_without_bn"}


@cache
def block_variants() -> tuple[Variant, ...]:
    """Return a variant for every block that exists with 3x3 kernels and equals no other; accuracies are the paper's."""
    printed = {row.name: row.top1_percent for row in (*TABLE_6_VARIANTS, *TABLE_7_VARIANTS)}
    return tuple(
        Variant(name, row.title, partial(_make, name), printed.get(name))
        for name, row in BLOCKS.items()
        if name not in EQUAL_AT_3X3 and _supports_3x3(name)
    )


def _supports_3x3(block: str) -> bool:
    try:
        create_block(block, Geometry.square(8, 8))
    except (UsageError, BorderError):
        return False
    return True


def base_architecture(name: str) -> ModelSpec:
    """Return the architecture that the variants are built on: :data:`SMALL_B0`, or one of ``repvgg list``.

    Raises:
        UnknownModelError: there is no such architecture.
    """
    return SMALL_B0 if name == SMALL_B0.name else spec_of(name)


def select_variants(variants: Sequence[Variant], names: Iterable[str]) -> tuple[Variant, ...]:
    """Return the named variants in the order of the table; all of them if no name is given.

    Raises:
        UsageError: a name is unknown; the text lists the closest ones, or all.
    """
    wanted = list(names)
    known = [variant.name for variant in variants]
    for name in wanted:
        if name not in known:
            advice = did_you_mean(name, known, f"choose one of {', '.join(known)}.")
            raise UsageError(f"The study has no row {name!r}: {advice}")
    return tuple(variant for variant in variants if not wanted or variant.name in wanted)


@dataclass(frozen=True, eq=False)
class Training:
    """One training of a study."""

    variant: Variant  # what is trained
    spec: ModelSpec  # the architecture that it is built on
    config: TrainConfig  # with the seed of the cell
    data: ImageData  # training and validation images, opened with that seed


def train_cell(training: Training, folder: Path) -> Cell:
    """Train, collapse and evaluate in a folder, from its last checkpoint if there is one; write the log there.

    Raises:
        RepvggError: see :func:`repvgg.training.fit`.
        EquivalenceError: the collapsed network does not equal the trained one.
        Terminated: SIGTERM arrived, and the run has saved its checkpoint.
    """
    from repvgg.training import LAST_CHECKPOINT, fit, write_log

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{str(folder)!r} cannot be created: {error.strerror or error}.") from error
    data, config = training.data, training.config
    model, remarks = _initial_model(training)

    def log(history: Sequence[Record], weights: Mapping[str, Tensor]) -> None:
        write_log(folder, history)

    with track_peak_memory(config.accelerator) as peak_bytes:
        result = fit(model, data, config, folder=folder, resume=True, progress=False, on_epoch=log)
    assert isinstance(result.validation, Evaluation)
    speeds = [record.images_per_second for record in result.history]
    cell: dict[str, Any] = {
        "row": training.variant.name,
        "seed": config.seed,
        "trained": _accuracy(result.validation),
        "deployed": _deploy(model, result.validation, training),
        "loss": result.history[-1].loss,
        "top1_percent_by_epoch": [100 * record.score for record in result.history],
        "epochs": len(result.history),
        "seconds": sum(record.seconds for record in result.history),
        "images_per_second": sum(speeds) / len(speeds),
        "peak_bytes": peak_bytes(),
        "parameters": _num_parameters(model),
        "version": __version__,
        "environment": environment(),
        "remarks": remarks,
    }
    (folder / LAST_CHECKPOINT).unlink(missing_ok=True)  # nothing to resume: the cell replaces the checkpoint
    return cell


def _initial_model(training: Training) -> tuple[nn.Module, list[str]]:
    """Return the network with the initial weights of its seed, and the warnings while building it."""
    with warnings.catch_warnings(record=True) as caught, seeded("model", training.config.seed):
        warnings.simplefilter("always", OtherBlockWarning)
        data = training.data
        model = training.variant.make(training.spec, len(data.classes), data.input_shape[0])
    return model, [str(warning.message) for warning in caught]


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _accuracy(result: Evaluation) -> dict[str, Any]:
    return {"correct": result.correct, "images": len(result.labels), "top1_percent": 100 * result.accuracy}


def _deploy(model: nn.Module, trained: Evaluation, training: Training) -> dict[str, Any]:
    """Collapse the network, evaluate it again, and verify that it is the same function."""
    from repvgg.training import evaluate_validation

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        plain, report = reparameterize(model, torch.zeros(1, *training.data.test_shape))
    result = evaluate_validation(plain, training.data, training.config)
    assert isinstance(result, Evaluation)
    # 256 images, because verification also runs both networks in float64, which would take minutes for all.
    batches = islice(training.data.val_batches(64), 4)
    images = [training.data.prepare(images) for images, _ in batches]
    evidence = verify(model, plain, images).raise_if_failed()
    return {
        **_accuracy(result),
        "same_answers": int((result.predictions == trained.predictions).sum()),
        "relative_error": evidence.relative,
        "tolerance": evidence.tolerance,
        "parameters": _num_parameters(plain),
        "is_plain": isinstance(plain, RepVGG) and form_of(plain) == "plain",
        "left": next((skipped.reason for skipped in report.left), ""),  # why it is not one convolution a layer
    }


MEMORY = "memory"  # key of a cell
_MACHINE = "cost"  # key of the cell with the machine that measured the cost
_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class StepCost:
    """What to measure of training steps, all variants side by side."""

    variants: Sequence[Variant]  # to measure
    spec: ModelSpec  # the architecture that they are built on
    config: TrainConfig  # of the training; its batch is that of a step
    image: tuple[int, int, int]  # (C, H, W)
    num_classes: int  # number of logits
    run: RunSettings  # device, dtype, memory format and threads
    rounds: int  # how often each variant is timed


def measure_cost(
    cost: StepCost, store: CellStore, machine: Mapping[str, str], on_progress: Callable[[int, int], None]
) -> None:
    """Add a cell for each missing round, and one with the memory of all variants.

    A step is forward, loss, backward and optimizer step, on random images that are in memory already.

    Raises:
        UsageError: the folder holds rounds of another machine, whose times do not compare.
    """
    if _MACHINE not in store:
        store.put(_MACHINE, dict(machine))
    if dict(store[_MACHINE]) != dict(machine):
        raise UsageError(
            f"The cost in {str(store.folder)!r} was measured on another machine, {store[_MACHINE].get('cpu')}: "
            "continue there, or remove its rounds from the folder of cells."
        )
    names = [variant.name for variant in cost.variants]
    protocol = SpeedProtocol(rounds=cost.rounds, warmup_seconds=INTERLEAVED.warmup_seconds)
    steps_of = partial(_training_steps, cost)
    measure_rounds([names], steps_of, store, cost.run, protocol, cost.config.batch_size, on_progress)
    if MEMORY not in store:
        steps = steps_of(names, lambda name, error: None)
        store.put(MEMORY, {name: _peak_bytes(step, cost.run.device) for name, step in steps.items()})


def cost_is_complete(store: CellStore, rounds: int) -> bool:
    """Return whether no cell of the cost is missing."""
    return MEMORY in store and sum(key.startswith("round-") for key in store.values) >= rounds


def _training_steps(cost: StepCost, names: Sequence[str], on_failure: OnFailure) -> Mapping[str, Call]:
    steps: dict[str, Call] = {}
    for variant in cost.variants:
        if variant.name in names:
            with catch_out_of_memory(variant.name, on_failure):
                steps[variant.name] = training_step(variant, cost)
    return steps


def training_step(variant: Variant, cost: StepCost) -> Call:
    """Return a training step of the variant on the same random images at every call."""
    from repvgg.training import classification_loss

    config, device = cost.config, cost.run.device
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    with warnings.catch_warnings(), seeded("model", config.seed):
        warnings.simplefilter("ignore", OtherBlockWarning)  # reported by the trainings
        model = variant.make(cost.spec, cost.num_classes, cost.image[0])
    model = model.to(device, memory_format=memory_format).train()  # type: ignore[call-overload]
    optimizer, _ = build_optimizer(model, config.optim, 1_000_000, 0)  # any length of the schedule will do
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch_size, *cost.image, generator=generator).to(device, memory_format=memory_format)
    labels = torch.randint(cost.num_classes, (config.batch_size,), generator=generator).to(device)
    half = _AUTOCAST_DTYPE.get(config.precision)

    def step() -> None:
        # The timing runs in inference mode, and a step needs gradients.
        with torch.inference_mode(False), torch.enable_grad():
            with nullcontext() if half is None else torch.autocast(device, half):
                loss = classification_loss(model(images), labels, config.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()  # frees the gradients, so that all memory of a step is allocated within it

    return step


def _peak_bytes(step: Call, device: str) -> int:
    """Return the peak memory of a step beyond weights, their averages and the optimizer's state."""
    step()  # the first step allocates that state
    if device == "cuda":
        return gpu_peak_bytes(step)
    return max(change.held for change in held_memory(step))
