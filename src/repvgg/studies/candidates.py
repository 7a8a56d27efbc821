"""Networks to time side by side: the forms of a model worth comparing, and the engines that run them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

import repvgg.engine
from repvgg.collapse import fold_batch_norms, reparameterize
from repvgg.deploy import ExportedModule, OnnxRunner, export_onnx, target_of
from repvgg.deploy.file_target import FileSpec
from repvgg.deploy.loading import run_in_parts
from repvgg.deploy.openvino import compile_for_cpu, openvino_core
from repvgg.deploy.targets import TARGETS, target_module
from repvgg.engine.frontend import read
from repvgg.errors import (
    NothingFoldedWarning,
    UnsupportedError,
    UsageError,
    did_you_mean,
    first_line,
)
from repvgg.measure import RunSettings
from repvgg.models import BASELINES, RepVGG, create_baseline, create_model, form_of, list_models, named_model

FORMS = ("train form", "batch norms folded", "plain form")
TRAIN, PLAIN = FORMS[0], FORMS[-1]
EXPORTED = "exported"  # the engine of exported files, which have a runtime of their own

Shape: TypeAlias = tuple[int, int, int]  # (C, H, W)
Run: TypeAlias = Callable[[Tensor], object]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network to time."""

    name: str  # in tables
    model: str  # the name it was requested by; its other forms share it
    form: str  # one of FORMS
    make: Callable[[], nn.Module]  # returns the network, in eval mode on the CPU; called once
    image: Shape  # (C, H, W) of its input
    engine: str = "torch"  # runs it; a key of ENGINES


def candidates_of(
    models: Sequence[str], input_size: int | None = None, engines: Sequence[str] = ("torch",)
) -> list[Candidate]:
    """Return every form of each RepVGG, and other models as they would be deployed: batch norms and branches folded.

    A single model is compared in its three forms, even if it is no RepVGG; a checkpoint in the plain form has no other
    form, and is timed alone. With several engines, there is a candidate for each form and engine, with the engine in
    its name. An exported file is timed once, in its own runtime.

    Args:
        models: names as :func:`repvgg.models.named_model` reads them, or exported files.
        input_size: height and width of the images; None takes each model's own.
        engines: keys of :data:`ENGINES`.

    Raises:
        UsageError: a model is named twice, or none is named.
        UnknownModelError: a model does not exist.
    """
    if not models or len(set(models)) < len(models):
        raise UsageError("Name the models to time, each once.")
    found = [candidate for name in models for candidate in _forms(name, len(models) == 1)]
    if input_size is not None:
        found = [replace(candidate, image=(candidate.image[0], input_size, input_size)) for candidate in found]
    several = len(engines) > 1
    timed = []
    for candidate in found:
        if candidate.engine == EXPORTED:
            timed.append(candidate)
        else:
            timed += [
                replace(candidate, engine=engine, name=f"{candidate.name}, {engine}" if several else candidate.name)
                for engine in engines
            ]
    return timed


def _forms(name: str, single: bool) -> list[Candidate]:
    if target_of(name):
        exported = ExportedModule(name, torch.get_num_threads())
        return [Candidate(f"{name}, {exported.runtime}", name, PLAIN, lambda: exported, exported.input_shape, EXPORTED)]
    named = named_model(name)
    model = named.model

    def candidate(label: str, form: str, network: nn.Module) -> Candidate:
        return Candidate(label, name, form, lambda: network, named.input_shape)

    if isinstance(model, RepVGG) and form_of(model) == "plain":
        return [candidate(name, PLAIN, model)]
    prove = named.weights != "random"  # random weights are for timing only: skip the proof
    with warnings.catch_warnings():
        # A model with nothing to fold has three equal forms, which the times show.
        warnings.simplefilter("ignore", NothingFoldedWarning)
        plain = reparameterize(model, prove=prove)[0]
        if not (single or isinstance(model, RepVGG)):
            return [candidate(name, PLAIN, plain)]
        folded = fold_batch_norms(model, prove=prove)[0]
    forms = zip(FORMS, (model, folded, plain), strict=True)
    return [candidate(form if single else f"{name}, {form}", form, network) for form, network in forms]


def runnable(candidates: Sequence[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates that their engine can run, and the reason for each of the others, by name.

    Raises:
        UsageError: none is left.
    """
    supported, unsupported = [], {}
    for candidate in candidates:
        try:
            ENGINES[candidate.engine].check(candidate.make(), candidate.image)
            supported.append(candidate)
        except UnsupportedError as error:
            unsupported[candidate.name] = first_line(error)
    if not supported:
        name, reason = next(iter(unsupported.items()))
        raise UsageError(f"The engine supports none of these models, for example {name!r}: {reason}.")
    return supported, unsupported


def baseline_among(candidates: Sequence[Candidate], wanted: str | None) -> str:
    """Return the name of the candidate that ``wanted`` refers to; for a model in several forms the plain one.

    Args:
        candidates: all of them; the first is the baseline if ``wanted`` is None.
        wanted: name of a candidate or of its model; a prefix up to a colon and the folder of a file may be left out.

    Raises:
        UsageError: there is none of that name; the text names the closest.
    """
    if wanted is None:
        return candidates[0].name
    # Later candidates win: the plain form is the last of a model, so the model's name refers to it.
    by_alias = {
        alias: one.name
        for one in candidates
        for alias in (one.name, one.model, one.model.rpartition(":")[2], Path(one.model).name)
    }
    if wanted not in by_alias:
        advice = did_you_mean(wanted, by_alias, f"choose one of {', '.join(by_alias)}.")
        raise UsageError(f"The baseline {wanted!r} is not among the models: {advice}")
    return by_alias[wanted]


def deployed(name: str) -> nn.Module:
    """Return an architecture with random weights as it would be deployed: a RepVGG plain, a baseline collapsed.

    The paper folds the batch norms of its baselines (§4.1). Collapsing does that, and merges the branches of MobileOne.
    """
    if name in list_models():
        return create_model(name, plain=True).eval()
    assert name in BASELINES
    return plain_form(create_baseline(name).eval())


def plain_form(model: nn.Module, image: Tensor | None = None) -> nn.Module:
    """Return a collapsed copy of a network, for counting and timing; the conversion is not proven.

    If there is nothing to fold, as in VGG-16 without batch norms, the copy is unchanged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        return reparameterize(model, image, prove=False)[0]


@dataclass(frozen=True)
class Engine:
    """A runtime for networks."""

    # Takes (model, settings, (C, H, W)) and returns a function of images (N, C, H, W).
    prepare: Callable[[nn.Module, RunSettings, Shape], Run]
    # Raises UnsupportedError, with the reason, for a model that it cannot run on such images; takes little time.
    check: Callable[[nn.Module, Shape], object]
    any_device: bool = False  # runs on any device and in any dtype; otherwise in float32 on the CPU


def _supports_all(model: nn.Module, image: Shape) -> None:
    pass


def _check_repvgg(model: nn.Module, image: Shape) -> None:
    read(model, [(1, *image)])


def _prepare_torch(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
    return settings.place(model)


def _prepare_repvgg(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
    network = repvgg.engine.compile(model.eval(), (1, *image))
    return lambda x: network(x)  # compiles for another batch size when it sees one


def _prepare_repvgg_searched(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
    return _per_batch_size(lambda x: repvgg.engine.compile(model.eval(), x.shape, search=True))


def _prepare_exported(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
    return model


def _check_exported(model: nn.Module, image: Shape) -> None:
    if not isinstance(model, ExportedModule):
        raise UnsupportedError(f"the engine {EXPORTED!r} is for exported files, which run in it without --engine")
    if model.input_shape != image:
        raise UnsupportedError(f"the file takes images of {' x '.join(map(str, model.input_shape))} only")


def _in_target(name: str) -> Callable[[nn.Module, RunSettings, Shape], Run]:
    """Return how a network is prepared for the runtime of an export target."""

    def prepare(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
        TARGETS[name].check_packages()
        module = target_module(name)
        folder = tempfile.TemporaryDirectory()  # kept as long as the function: a runtime may read its file later
        path = Path(folder.name) / f"model{TARGETS[name].suffix}"
        module.write(model.eval(), path, FileSpec(image, TARGETS[name].dynamic_batch))
        runner = module.load(path, torch.get_num_threads())

        def run(x: Tensor) -> object:
            assert folder.name  # it is removed with this function
            return run_in_parts(runner, x)

        return run

    return prepare


def _prepare_onnxruntime(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model.eval(), path, image)
        return OnnxRunner(path, torch.get_num_threads())


def _prepare_openvino(model: nn.Module, settings: RunSettings, image: Shape) -> Run:
    core = openvino_core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model.eval(), path, image)
        content = path.read_bytes()

    def prepare(images: Tensor) -> Run:
        # Static shapes are faster than a dynamic batch: one compiled model a batch size.
        graph = core.read_model(content, b"")
        graph.reshape(list(images.shape))
        request = compile_for_cpu(core, graph)
        return lambda x: request.infer([x.contiguous().numpy()], share_inputs=True)[0]

    return _per_batch_size(prepare)


def _per_batch_size(prepare: Callable[[Tensor], Run]) -> Run:
    """Prepare once for each batch size, when its first images arrive."""
    runs: dict[int, Run] = {}

    def run(x: Tensor) -> object:
        if len(x) not in runs:
            runs[len(x)] = prepare(x)
        return runs[len(x)](x)

    return run


#: The engines by name. ``repvgg-searched`` tunes each convolution on this machine first.
ENGINES: dict[str, Engine] = {
    "torch": Engine(_prepare_torch, _supports_all, any_device=True),
    "repvgg": Engine(_prepare_repvgg, _check_repvgg),
    "repvgg-searched": Engine(_prepare_repvgg_searched, _check_repvgg),
    "onnxruntime": Engine(_prepare_onnxruntime, _supports_all),
    "openvino": Engine(_prepare_openvino, _supports_all),
    "executorch": Engine(_in_target("executorch"), _supports_all),
    "ncnn": Engine(_in_target("ncnn"), _supports_all),
    EXPORTED: Engine(_prepare_exported, _check_exported),
}


_CHOICES = [name for name in ENGINES if name != EXPORTED]  # exported files run in it without being asked


def check_engines(names: Sequence[str], settings: RunSettings) -> None:
    """Refuse unknown engines, and settings that one of the engines does not support.

    Raises:
        UsageError: the text names the engine.
    """
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"There is no engine {name!r}: choose one of {', '.join(_CHOICES)}.")
        if not ENGINES[name].any_device and (settings.device, settings.dtype) != ("cpu", "float32"):
            raise UsageError(f"The engine {name!r} computes in float32 on the CPU: leave out --device and --dtype.")
    if not names or len(set(names)) < len(names):
        raise UsageError("Name the engines, each once.")
