"""A plan carried out: a new model with the regions replaced, everything else copied, the original untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg.algebra import ConvMap
from repvgg.collapse.capture import join
from repvgg.collapse.cost import emitted_map
from repvgg.collapse.graph_rewriter import Graft, copied, copies_of_results, grafts_of
from repvgg.collapse.plan import Plan, Unit, Whole
from repvgg.collapse.proof import Proof, image_for, prove_region, small_input
from repvgg.collapse.regions import Placing, Region
from repvgg.collapse.report import Folded, Part, Replaced, describe_module, entry, part_of, parts_in, parts_of
from repvgg.collapse.symbolic_eval import Evaluator
from repvgg.errors import ReparamError, UsageError
from repvgg.symbolic import Layout, Source, SymbolicTensor, algebra_device, first_float, run, shadow_of

Module = TypeVar("Module", bound=nn.Module)
_PLAIN = (bool, int, float, str, tuple, list, type(None))


@dataclass(frozen=True, eq=False)
class Outcome:
    """A plan carried out.

    Attributes:
        plain: the new model.
        replaced: what was folded, in the order of the model.
        refused: modules, by their identity, that cannot be replaced after all, and why: the plan has to do without.
    """

    plain: nn.Module
    replaced: tuple[Replaced, ...]
    refused: dict[int, str]


def carry_out(model: nn.Module, plan: Plan, *, prove: bool) -> Outcome:
    """Build the plain model and say what was folded; if asked to ``prove``, judge each convolution as it is made.

    Copying is one deep copy in which every replaced module is found already copied, as what replaces it.

    Raises:
        ReparamError: something in the model cannot be copied; the text names it.
    """
    builder = _Builder(model, prove)
    builder.memo.update({id(model.get_submodule(path)): nn.Identity() for path in plan.dropped})
    with torch.no_grad():
        for whole in plan.wholes:
            builder.replace_whole(whole)
        for unit in plan.units:
            builder.replace_unit(unit)
        plain = copied(model, builder.memo, model)
    for path in plan.dropped:
        _detach(plain, path)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def place(done: Replaced) -> int:
        name = done.row.name
        return order.get(name, order.get(name.rpartition(".")[0], len(order)))

    return Outcome(plain, tuple(sorted(builder.done, key=place)), builder.refused | builder.misplaced(plain))


class _Builder:
    """Fills the memo of the deep copy with convolutions, and keeps account of them.

    Attributes:
        memo: what stands in the copy for each module, by its identity.
        done: what was replaced.
        refused: see :class:`Outcome`.
    """

    def __init__(self, model: nn.Module, prove: bool) -> None:
        self.prove = prove
        self.memo: dict[int, Any] = copies_of_results(model)
        self.done: list[Replaced] = []
        self.refused: dict[int, str] = {}

    def replace_whole(self, whole: Whole) -> None:
        """Put one convolution in the place of a module."""
        device = algebra_device(_like(whole.module))
        symbol = run(whole.module, Source(), whole.conv.in_channels, device=device, layout=whole.layout)
        conv = self._emit(symbol.map, symbol.layout, whole.module, [whole.module])
        if conv is None:
            return
        proof = self._prove(lambda: _module_in_float64(whole.module, device), symbol, conv)
        if proof.failure:
            self._refuse([whole.module], proof)
            return
        self.memo[id(whole.module)] = _in_place_of(whole.module, conv)
        row = entry(whole.path, parts_of(whole.module), symbol, whole.module, whole.cost, proof.text)
        self.done.append(Replaced(row, conv, list(whole.module.modules())))

    def _prove(self, before: Callable[[], Callable[[Tensor], Tensor]], symbol: SymbolicTensor, after: Plain) -> Proof:
        """Judge a convolution against what ``before`` makes; this makes it only if it is asked to prove."""
        if not self.prove:
            return Proof(None, "", ran=False)
        return prove_region(before(), image_for(symbol.map, symbol.source.layout), after)

    def _refuse(self, modules: list[nn.Module], proof: Proof) -> None:
        reason = f"its merged form does not prove equal to it: {proof.failure}"
        self.refused |= {id(part): reason for module in modules for part in module.modules()}

    def replace_unit(self, unit: Unit) -> None:
        """Replace the regions of one unit: paths in their own places, others by a call in a new forward."""
        grafts = grafts_of(unit.flat, unit.placings())
        distinct = list({id(graft): graft for graft in grafts.values()}.values())
        for graft in distinct:
            self.memo |= graft.copies()
        gone: list[nn.Module] = []
        for region, placing in unit.regions.found:
            self._replace(unit, region, placing, grafts, gone)
        for region, _ in unit.regions.scaled:
            self._scale(unit, region, grafts)
        self.memo |= {id(part): nn.Identity() for part in gone}
        for graft in distinct:
            graft.copy_state(self.memo, unit.path)
            graft.finish()
        for part in gone:
            del self.memo[id(part)]

    def _replace(
        self, unit: Unit, region: Region, placing: Placing, grafts: dict[str, Graft], gone: list[nn.Module]
    ) -> None:
        """Replace one region; modules that its merged convolution leaves nothing of are added to ``gone``."""
        symbol = solve(region)
        merged = symbol.map
        modules = [unit.module.get_submodule(path) for path in region.called]
        host = unit.module.get_submodule(placing.host)
        owner = nn.ModuleList(modules) if modules else host
        of_dtype = owner if any(True for _ in owner.parameters()) else host
        conv = self._emit(merged, symbol.layout, of_dtype, modules or [host])
        if conv is None:
            return
        proof = self._prove(lambda: _in_float64(region), symbol, conv)
        if proof.failure:
            self._refuse(modules or [host], proof)
            return
        conv.train(host.training)
        if placing.in_place:
            name = self._in_place(unit, region, conv, grafts)
        else:
            graft = grafts[placing.host]
            name = graft.call(conv, region.source, region.exit)
            for step in reversed(region.steps[:-1]):
                graft.take_out(step.node, region.source)
            gone += modules
        row = entry(join(unit.path, name), parts_in(unit.module, region), symbol, owner, region.value.cost, proof.text)
        self.done.append(Replaced(row, conv, modules or [host]))

    def _scale(self, unit: Unit, region: Region, grafts: dict[str, Graft]) -> None:
        """Fold a region into the transposed convolution that is its source."""
        path = str(region.source.target)
        old: Any = unit.module.get_submodule(path)
        modules = [old, *map(unit.module.get_submodule, region.called)]
        try:
            new: Any = scaled(old, solve(region).map)
        except ReparamError as error:
            self.refused |= {id(module): str(error) for module in modules}
            return
        proof = Proof(None, "", ran=False)
        if self.prove:
            first, then = _module_in_float64(old, algebra_device(old.weight)), _in_float64(region)
            proof = prove_region(lambda x: then(first(x)), small_input(old), new)
        if proof.failure:
            self._refuse(modules, proof)
            return
        self._in_place(unit, region, new, grafts)
        parts = [Part(path, describe_module(old)), *(part_of(unit.module, s) for s in region.steps if s.effective)]
        before, after = (sum(p.numel() for p in part.parameters()) for part in (nn.ModuleList(modules), new))
        adds = float(old.weight.numel())
        row = Folded(join(unit.path, path), tuple(parts), describe_module(new), before, after, adds, adds, proof.text)
        self.done.append(Replaced(row, new, modules))

    def _in_place(self, unit: Unit, region: Region, conv: nn.Module, grafts: dict[str, Graft]) -> str:
        """Put the convolution where the first one was, and nothing where the others were; the outcome is its path."""
        place, before, name = region.first_convolution, region.source, ""
        nodes = [(step.node, step.effective) for step in region.steps]
        for node, effective in [(place, True), *nodes] if place is before else nodes:
            if node.op == "call_module":
                module = unit.module.get_submodule(str(node.target))
                self.memo[id(module)] = _in_place_of(module, conv if node is place else nn.Identity())
                name = str(node.target) if node is place else name
            elif effective:
                graft = grafts[unit.flat.owner(node)]
                if node is place:
                    name = graft.call(conv, before, node)
                else:
                    graft.take_out(node, before)
            before = node
        return name

    def _emit(self, conv: ConvMap, layout: Layout, owner: nn.Module, replaced: list[nn.Module]) -> Plain | None:
        """The convolution, trainable iff anything in its place was; None if its numbers do not fit the dtype."""
        parameters = list(owner.parameters())
        trainable = not parameters or any(p.requires_grad for p in parameters)
        try:
            return to_module(conv, _like(owner), layout, requires_grad=trainable)
        except ReparamError as error:
            self.refused |= {id(module): str(error) for module in replaced}
            return None

    def misplaced(self, plain: nn.Module) -> dict[int, str]:
        """Modules whose convolution is not in the copy, because something copies itself in a way of its own."""
        inside = {id(part) for part in plain.modules()}
        lost = [done.modules for done in self.done if id(done.conv) not in inside]
        return {id(part): "what it is in has a __deepcopy__ of its own" for modules in lost for part in modules}


def _in_place_of(old: nn.Module, new: Module) -> Module:
    """``new`` in the mode of ``old``, with the plain attributes of ``old`` that others may read."""
    for name, value in vars(old).items():
        if isinstance(value, _PLAIN) and not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, copy.copy(value))
    new.training = old.training
    return new


def _like(module: nn.Module) -> Tensor:
    """The tensor that tells dtype, device and memory format: the largest kernel, else the first number."""
    kernels = [p for p in module.parameters() if p.dim() == 4]
    like = max(kernels, key=Tensor.numel) if kernels else first_float(module)
    if like is None:
        raise ReparamError("a module without any floating-point tensor cannot become a convolution")
    return like


def _float64_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device=device, dtype=torch.float64)


def _module_in_float64(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A module as it is, a function on float64."""
    shadow = shadow_of(module, _float64_on(device), training=False)
    return lambda x: shadow(x.to(device))


def _in_float64(region: Region) -> Callable[[Tensor], Tensor]:
    """The region as it is, a function on float64."""
    device = algebra_device(first_float(region.flat.module))
    evaluator = Evaluator(region.flat, _float64_on(device), keep_kernels=False)
    return lambda x: evaluator.outcome(region.source, x.to(device), [step.node for step in region.steps])


def solve(region: Region) -> SymbolicTensor:
    """The region's convolution, with its values, in float64."""
    device = algebra_device(first_float(region.flat.module))
    evaluator = Evaluator(region.flat, _float64_on(device))
    layout = region.value.symbol.source.layout
    source = SymbolicTensor.of(Source(), region.value.symbol.map.in_channels, device=device, layout=layout)
    source.source.sizes = region.value.symbol.source.sizes
    outcome: SymbolicTensor = evaluator.outcome(region.source, source, [step.node for step in region.steps])
    return outcome


def scaled(transposed: _ConvTransposeNd, scaling: ConvMap) -> _ConvTransposeNd:
    """``scaling(transposed(x))`` as one transposed convolution.

    With kernel W (I, O / groups, *K), bias b and ``y ↦ a·y + c`` for each channel: kernel ``a·W``, the output channels
    of each group being those of axis 1, and bias ``a·b + c``. Computed in float64 and cast once.

    Raises:
        ReparamError: a weight does not fit into the dtype.
    """
    weight_IOK, groups = transposed.weight.detach(), transposed.groups
    factor_O = scaling.weight.flatten().to(weight_IOK.device)
    by_group = factor_O.view(groups, 1, -1, *(1,) * (weight_IOK.dim() - 2))  # (g, 1, O/g, 1, …)
    kernel = weight_IOK.double().view(groups, -1, *weight_IOK.shape[1:]) * by_group
    offset_O = scaling.bias_or_zeros().to(weight_IOK.device)
    if transposed.bias is not None:
        offset_O = offset_O + factor_O * transposed.bias.detach().double()
    new = copy.copy(transposed)
    new.__dict__ = {**vars(transposed), "_parameters": {}}
    new.weight = _like_parameter(cast(kernel.view(weight_IOK.shape), weight_IOK), transposed)
    new.bias = _like_parameter(cast(offset_O, weight_IOK), transposed)
    return new


def _like_parameter(value: Tensor, transposed: _ConvTransposeNd) -> nn.Parameter:
    return nn.Parameter(value.clone(memory_format=torch.preserve_format), transposed.weight.requires_grad)


def _detach(plain: nn.Module, path: str) -> None:
    """Take a dropped submodule out of the copy."""
    owner_path, _, name = path.rpartition(".")
    try:
        owner = plain.get_submodule(owner_path)
    except AttributeError:  # the owner itself was replaced
        return
    if isinstance(owner, nn.ModuleDict):
        del owner[name]
    elif not isinstance(owner, (nn.Sequential, nn.ModuleList)):
        setattr(owner, name, None)


Plain: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def to_module(conv: ConvMap, like: Tensor, layout: Layout, *, requires_grad: bool = True) -> Plain:
    """The module that computes ``conv``, in dtype, device and memory format of the kernel ``like``.

    It is an ``nn.Linear`` for rows and vectors, else an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``. The weights are
    cast once, here. The random number generator is not touched.

    Args:
        conv: what to compute.
        like: a tensor that tells dtype, device and memory format.
        layout: the shape of the input.
        requires_grad: of the parameters.

    Raises:
        ReparamError: a weight is finite in float64 and not in the dtype of ``like``, or there is no module that
            computes ``conv``: a linear map of rows in groups.
        UsageError: ``conv`` is no map of tensors of that layout.
    """
    if conv.spatial != layout.spatial:
        raise UsageError(f"A map over {conv.spatial} axes is none of tensors {layout}.")
    conv = emitted_map(conv)
    module = _convolution(conv, like) if conv.spatial else _linear(conv, like)
    module.weight = nn.Parameter(_written_out(conv, like), requires_grad)
    module.bias = nn.Parameter(cast(conv.bias_or_zeros(), like).clone(), requires_grad)
    return module


def _convolution(conv: ConvMap, like: Tensor) -> Plain:
    before, after = conv.padding[::2], conv.padding[1::2]
    module: Plain = _CONVOLUTIONS[conv.spatial](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        before if before == after else "same",
        conv.dilation,
        conv.groups,
        bias=True,
        padding_mode=conv.border or "zeros",
        device="meta",
        dtype=like.dtype,
    )
    return module


def _linear(conv: ConvMap, like: Tensor) -> nn.Linear:
    if conv.groups > 1:
        raise ReparamError(f"a linear map of rows in {conv.groups} groups is no nn.Linear")
    return nn.Linear(conv.in_channels, conv.out_channels, bias=True, device="meta", dtype=like.dtype)


def _memory_format(like: Tensor, dim: int) -> torch.memory_format:
    """That of ``like``, for a tensor of ``dim`` axes."""
    last = _CHANNELS_LAST.get(dim)
    if last is None or like.dim() != dim or like.is_contiguous() or not like.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _written_out(conv: ConvMap, like: Tensor) -> Tensor:
    """The kernel, multiplied out piece by piece and cast once."""
    shape = conv.kernel.shape
    order = _memory_format(like, len(shape))
    weight = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)
    for rows, sums in conv.kernel.chunks():
        weight[rows].copy_(sums)
    return _fits(weight)


def cast(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``like``."""
    return _fits(value.detach().to(device=like.device, dtype=like.dtype, copy=True))


def _fits(cast: Tensor) -> Tensor:
    """``cast`` itself, if no number became infinite in its dtype."""
    if not cast.is_meta and cast.numel() and any(bool(torch.isinf(end)) for end in torch.aminmax(cast)):
        raise ReparamError(f"the merged weights do not fit into {str(cast.dtype).removeprefix('torch.')}")
    return cast
