"""Quantization-aware training: train the branches, and compute with the integers of the plain form.

:func:`prepare_qat` collapses the network once, to learn which layers the plain form has. From then on every training
pass merges the branches of each layer anew, quantizes the merged kernel, and runs the plain form with it; gradients
pass through the merge to the branches. So the integers are those of the network that is deployed, a step takes one
convolution for each layer, and :meth:`QatNetwork.to_integers` needs no calibration.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._arguments import check_model
from repvgg.collapse import Report, reparameterize
from repvgg.errors import NothingFoldedWarning, ReparamError, UsageError
from repvgg.quantization.api import calibration_images, layers_to_quantize
from repvgg.quantization.bias_correction import mean_shift
from repvgg.quantization.calibration import LayerStatistics, collect_statistics, hooked, run
from repvgg.quantization.equalization import EqualizationReport, equalize
from repvgg.quantization.fake import FakeQuantLayer, kernel_of
from repvgg.quantization.ranges import choose_quantizer
from repvgg.quantization.refinement import images_at_once, layer_inputs
from repvgg.quantization.settings import QuantizationSettings

_BATCH = 32  # calibration images at once
_SAME_KERNEL = 1e-5  # of the largest weight: float32 rounds to 6e-8, and the kernel of another layer is far off


@final
@dataclass(frozen=True)
class QatReport:
    """What :func:`prepare_qat` did.

    Attributes:
        layers: names of the layers that are simulated in integers, in the plain form.
        merged: how many of them are merged from branches or batch norms.
        skipped: why other layers stay in float32, by name.
        untrained: number of parameters that the plain form does not have, such as those of auxiliary heads.
        rounded: how many layers start from adaptively rounded weights, by parameters of the train form.
        corrected: how many layers had their biases corrected, likewise.
        equalization: None if it was switched off.
    """

    layers: tuple[str, ...]
    merged: int
    skipped: Mapping[str, str]
    untrained: int
    rounded: int
    corrected: int
    equalization: EqualizationReport | None

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers in simulated integers, {self.merged} of them merged from branches"]
        if self.equalization is not None:
            lines += str(self.equalization).splitlines()[:1]
        for count, what in ((self.rounded, "adapted the rounding"), (self.corrected, "corrected the biases")):
            if count:
                lines.append(f"{what} of {count} of {len(self.layers)} layers, in the parameters of the train form")
        lines += [f"in float32: {name}, because {reason}" for name, reason in self.skipped.items()]
        if self.untrained:
            lines.append(f"{self.untrained:,} parameters are not in the plain form and are not trained")
        return "\n".join(lines)


@final
class QatNetwork(nn.Module):
    """A network whose parameters are those of the train form, and whose forward simulates the quantized plain form.

    Made by :func:`prepare_qat`. Batch norms fold with their running statistics, which stay as they are: they are in
    eval mode in training too, and their scales and shifts are trained.

    Attributes:
        train_form: the network with its branches; it is trained in place.
        simulated: the plain form with :class:`FakeQuantLayer` modules, which read their kernels from ``train_form``.
    """

    def __init__(self, train_form: nn.Module, simulated: nn.Module) -> None:
        super().__init__()
        self.train_form = train_form
        self.simulated = simulated

    def forward(self, x: Tensor) -> Any:
        return self.simulated(x)

    def train(self, mode: bool = True) -> QatNetwork:
        super().train(mode)
        self.train_form.eval()  # the merge is that of eval mode
        return self

    @property
    def layers(self) -> dict[str, FakeQuantLayer]:
        """The simulated layers by their names in the plain form."""
        return {name: part for name, part in self.simulated.named_modules() if isinstance(part, FakeQuantLayer)}

    def observe(self, observing: bool) -> None:
        """Set whether training passes move the ranges of inputs towards those of their batches."""
        for layer in self.layers.values():
            layer.observing = observing

    def search_weight_clips(self) -> None:
        """Choose the scales of all weights anew by the smallest squared error."""
        for layer in self.layers.values():
            layer.search_weight_clip()

    def to_integers(self) -> nn.Module:
        """Return the plain form in exact integers, as :func:`repvgg.quantize` does: those that are simulated."""
        memo: dict[int, Any] = {id(layer): layer.to_integers() for layer in self.layers.values()}
        return copy.deepcopy(self.simulated, memo).eval()

    def train_form_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a ``state_dict`` of this network says about the train form, under its own names."""
        prefix = "train_form."
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def prepare_qat(
    model: nn.Module,
    calibration: Tensor | Iterable[Any],
    settings: QuantizationSettings | None = None,
    *,
    learn_ranges: bool = False,
) -> tuple[QatNetwork, QatReport]:
    """Return a network to train that computes with the integers of the plain form of ``model``.

    Train it as any other network, then call :meth:`QatNetwork.to_integers`.

    Args:
        model: a trained network, in the train form or plain; its plain form is a chain of convolutions and linear
            layers, each of which is merged from one module, or from modules that are called one after the other. It is
            not changed.
        calibration: as for :func:`repvgg.quantize`; the ranges start from it.
        settings: as for :func:`repvgg.quantize`, whose steps give the integers that training starts from.
        learn_ranges: train the ranges of inputs instead of observing them.

    Raises:
        UsageError: no module stands for the merged kernel of a layer, or there is nothing to quantize.
    """
    settings = settings or QuantizationSettings()
    check_model(model, "prepare_qat")
    images = calibration_images(calibration)
    train_form = copy.deepcopy(model).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)  # a plain checkpoint
        plain, collapsed = reparameterize(train_form, images[:2])
    names, skipped = layers_to_quantize(plain)
    sources = {name: _source_of(train_form, plain, collapsed, name) for name in names}
    equalized: EqualizationReport | None = None
    reference = plain
    if settings.equalize:
        reference, equalized = equalize(plain, images[:2])
        if not equalized.factors.keys() <= set(names):  # a layer that stays in float32 would need its factor as well
            reference, equalized = plain, None
    statistics = collect_statistics(reference, names, torch.split(images, _BATCH))
    if unused := [name for name in names if not statistics[name].calls]:
        raise UsageError(f"{unused[0]!r} is not called on the calibration images: remove it from the model.")
    for name, source in sources.items():
        layer = plain.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        quantizer = choose_quantizer(statistics[name].inputs, settings.ranges, settings.percentile)
        factors = None if equalized is None else equalized.factors.get(name)
        fake = FakeQuantLayer(layer, source, quantizer, settings, factors, learn_range=learn_ranges)
        plain.set_submodule(name, fake)
    _share_the_rest(plain, train_form)
    network = QatNetwork(train_form, plain).train(model.training)
    untrained = _freeze_unused(network, list(sources.values()))
    refined = _refine(network, statistics, images, settings)
    merged = sum(type(source) not in (nn.Conv2d, nn.Linear) for source in sources.values())
    return network, QatReport(tuple(names), merged, skipped, untrained, *refined, equalized)


def _refine(
    network: QatNetwork, statistics: Mapping[str, LayerStatistics], images: Tensor, settings: QuantizationSettings
) -> tuple[int, int]:
    """Adapt the rounding and correct the bias of one layer after the other, as :func:`repvgg.quantize` does.

    What changes are parameters of the train form. Returns the numbers of layers whose rounding and bias changed. Where
    the feature maps of all images do not fit into memory, the network runs once for each layer, on parts of the images.
    """
    if not (settings.rounding_sweeps or settings.correct_biases):
        return 0, 0
    simulated = network.layers
    layers = {name: simulated[name] for name, found in statistics.items() if found.calls == 1}
    rounded, corrected = 0, 0

    def refine(name: str, inputs: Iterable[Tensor]) -> None:
        nonlocal rounded, corrected
        layer = layers[name]
        if settings.rounding_sweeps:
            with torch.enable_grad():  # of the merge, which says how a parameter acts on the kernel
                rounded += layer.adapt_rounding(inputs, settings.rounding_sweeps)
        if settings.correct_biases:
            with torch.no_grad():
                shift = mean_shift((layer.forward(x) for x in inputs), statistics[name])
            with torch.enable_grad():
                corrected += layer.shift_bias(shift)

    def visit(name: str, x: Tensor, _: Tensor) -> Tensor:
        refine(name, [x])
        return layers[name].forward(x)  # not the call, which would visit it again

    was_training = network.training
    network.eval()
    at_once = images_at_once(statistics[name] for name in layers)
    if at_once >= len(images):
        with hooked(network.simulated, list(layers), visit):
            run(network, images)
    else:
        parts = torch.split(images, at_once)
        for name, layer in layers.items():
            refine(name, layer_inputs(network.simulated, name, layer.quantizer, parts))
    network.train(was_training)
    return rounded, corrected


def _source_of(train_form: nn.Module, plain: nn.Module, collapsed: Report, name: str) -> nn.Module:
    """Return the module of the train form, or a sequence of modules, that equals a layer of the plain form."""
    wanted = plain.get_submodule(name)
    modules = dict(train_form.named_modules())
    candidates: list[nn.Module] = [modules[name]] if name in modules else []
    for region in collapsed.folded:
        parts = [modules[part.name] for part in region.parts if part.name in modules]
        if region.name == name and len(parts) == len(region.parts) > 1:
            candidates.append(nn.Sequential(*parts))
    for candidate in candidates:
        try:
            weight, bias = kernel_of(candidate)
        except ReparamError:
            continue
        if _same(weight, wanted.weight) and _same(bias, wanted.bias):
            return candidate
    raise UsageError(
        f"No single module stands for the merged kernel of {name!r}, as its branches meet in a forward: put them into "
        "a module of their own, such as repvgg.blocks.BranchSum, or quantize after training with repvgg.quantize."
    )


def _same(one: Tensor | None, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    largest = float(other.detach().abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=0, atol=_SAME_KERNEL * largest + 1e-30))


def _share_the_rest(simulated: nn.Module, train_form: nn.Module) -> None:
    """Let what is left of the plain form, such as batch norms and scales, be that of the train form.

    Raises:
        UsageError: the train form has no such module.
    """
    modules = dict(train_form.named_modules())
    for name, part in list(simulated.named_modules()):
        own = {**part._parameters, **part._buffers}
        if isinstance(part, FakeQuantLayer) or not own:
            continue
        same = modules.get(name)
        if same is None or {*same._parameters, *same._buffers} != set(own):
            raise UsageError(
                f"{name or 'the model'} has parameters that no module of the train form has: they cannot be trained."
            )
        if next(part.children(), None) is None and name:
            simulated.set_submodule(name, same)
        else:
            part._parameters, part._buffers = same._parameters, same._buffers


def _freeze_unused(network: QatNetwork, sources: Sequence[nn.Module]) -> int:
    """Freeze the parameters of the train form that no layer reads, and return their number."""
    used = {id(parameter) for source in sources for parameter in source.parameters()}
    used |= {id(parameter) for parameter in network.simulated.parameters()}
    unused = [parameter for parameter in network.train_form.parameters() if id(parameter) not in used]
    for parameter in unused:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in unused)
