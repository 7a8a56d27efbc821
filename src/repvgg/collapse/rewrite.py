"""Apply a plan: build a new model with the regions replaced and all else copied; the original stays untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from repvgg import algebra
from repvgg.algebra import ConvMap, over_axes
from repvgg.collapse.cost import emitted_map
from repvgg.collapse.evaluator import Evaluator
from repvgg.collapse.graph_rewriter import ForwardRewriter, copies_of_computed_tensors, deep_copy, rewriters_for
from repvgg.collapse.insertion import Replacement, own_kernel
from repvgg.collapse.modules import join, submodule_or_none
from repvgg.collapse.plan import Plan, Reasons, Scope
from repvgg.collapse.proof import NOT_PROVEN, Proof, image_for, image_for_transposed, prove_region
from repvgg.collapse.region import Absorbed, Region
from repvgg.collapse.report import (
    Folded,
    Part,
    Replaced,
    describe_module,
    folded_entry,
    part_of_step,
    parts_of_region,
)
from repvgg.errors import ReparamError, UsageError
from repvgg.symbolic import Layout, Source, SymbolicTensor, algebra_device, first_float, shadow_of
from repvgg.verify.float64 import Float64Mode

Module = TypeVar("Module", bound=nn.Module)
PlainConv: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PLAIN_DATA = (bool, int, float, str, tuple, list, type(None))


@dataclass(frozen=True, eq=False)
class Applied:
    """The result of applying a plan.

    Attributes:
        plain: the new model.
        replaced: what was folded, in the order of the model.
        failed: modules that cannot be replaced after all, and why.
    """

    plain: nn.Module
    replaced: tuple[Replaced, ...]
    failed: Reasons


def apply_plan(model: nn.Module, plan: Plan, *, prove: bool, take_tensors: bool = False) -> Applied:
    """Build the plain model; with ``prove``, compare each convolution with what it replaces.

    With ``take_tensors``, what stays is shared with ``model``, the result of an earlier pass, in place of a copy.

    Raises ReparamError if an attribute of the model cannot be copied.
    """
    applier = _PlanApplier(model, prove)
    if take_tensors:
        applier.memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for skipped in plan.dropped:
        applier.substitute(model.get_submodule(skipped.name), nn.Identity())
    for path, stand_in in plan.unread().items():
        applier.substitute(model.get_submodule(path), stand_in)
    with torch.no_grad():
        for scope in plan.scopes:
            applier.replace_regions(scope)
        plain = deep_copy(model, applier.memo, model)
    for skipped in plan.dropped:
        _detach(plain, skipped.name)
    for scope in plan.scopes:
        for path, guard in scope.placement.guards.items():
            guarded = submodule_or_none(plain, join(scope.path, path))
            if guarded is not None:
                if not isinstance(guarded, type(scope.module.get_submodule(path))):
                    guard = guard.for_convolution(guarded)
                guarded.register_forward_pre_hook(guard, with_kwargs=True)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}

    def position(done: Replaced) -> int:
        name = done.entry.name  # a convolution with a new name is sorted by its owner
        return order.get(name, order.get(name.rpartition(".")[0], len(order)))

    replaced = tuple(sorted(applier.done, key=position))
    return Applied(plain, replaced, applier.failed | applier.find_lost(plain))


class _PlanApplier:
    """Collect what replaces each module, and the report entries for it.

    The model is then copied by one ``deepcopy`` whose memo contains the replacements as if they were copied already.

    Attributes:
        memo: the replacement or copy of each object, by object id.
        done: what was replaced.
        failed: see :class:`Applied`.
    """

    def __init__(self, model: nn.Module, prove: bool) -> None:
        self.prove = prove
        self.memo: dict[int, Any] = copies_of_computed_tensors(model)
        self.done: list[Replaced] = []
        self.taken_by: dict[nn.Module, nn.Module] = {}
        self.failed: Reasons = {}

    def substitute(self, old: nn.Module, new: nn.Module) -> None:
        """Let ``new`` be the copy of ``old``."""
        self.memo[id(old)] = new

    def replace_regions(self, scope: Scope) -> None:
        """Replace the regions of one scope: modules, chains in place, or by a call in a new forward."""
        rewriters = rewriters_for(scope.recording, [found.insertion for found in scope.regions.all])
        distinct = list({id(rewriter): rewriter for rewriter in rewriters.values()}.values())
        for rewriter in distinct:
            for old, new in rewriter.copies().items():
                self.substitute(old, new)
        absorbed: list[nn.Module] = []
        for found in scope.regions.merged:
            self._replace_region(scope, found, rewriters, absorbed)
        for found in scope.regions.scaled:
            self._scale_transposed(scope, found, rewriters)
        for found in scope.regions.absorbed:
            self._remove(scope, found.region.exit, found.region.source, rewriters)
        # While the rewriters copy their state, absorbed modules count as copied, or their weights would be copied.
        # Afterwards the entries go: another owner of the same module needs a real copy.
        for part in absorbed:
            self.substitute(part, nn.Identity())
        for rewriter in distinct:
            rewriter.copy_state(self.memo, scope.path)
            rewriter.finish()
        for part in absorbed:
            self.memo.pop(id(part), None)

    def _replace_region(
        self, scope: Scope, found: Replacement, rewriters: dict[str, ForwardRewriter], absorbed: list[nn.Module]
    ) -> None:
        region, point = found.region, found.insertion
        modules = [scope.module.get_submodule(path) for path in region.called_modules]
        host = scope.module.get_submodule(point.host)
        if point.kind == "module":
            modules = [host]
        try:
            symbol = solve(found)
        except ReparamError as error:  # with values, more is known than with shapes
            self.failed |= dict.fromkeys(modules or [host], str(error))
            return
        # A region of functions only calls no module; its weights are those of the host.
        owner = nn.ModuleList(modules) if modules else host
        like = owner if any(True for _ in owner.parameters()) else host
        stays = point.kind == "chain" or region.read_by_convolution is not region.source
        layout = region.layout_in_place if stays else None
        conv = self._emit(symbol, like, modules or [host], layout)
        if conv is None:
            return
        same_axes = symbol.has_axes_of_source and layout in (None, symbol.layout)
        after = conv if same_axes else _Chain(region, conv)
        # Code that reshapes to recorded sizes only runs on a tensor of the recorded shape.
        shape = symbol.source.shape if region.reads_sizes or not same_axes else None
        proof = self._prove(lambda: _in_float64(found), symbol, after, shape)
        if proof.failure:
            self._fail(modules or [host], proof)
            return
        # A convolution is the same function in both modes, but code may read the flag.
        conv.train(host.training)
        if point.kind == "module" and point.host not in rewriters:
            name = point.host
            self.substitute(host, _with_attributes_of(host, conv))
        elif point.kind == "chain":
            name = self._insert_in_place(scope, found, conv, rewriters)
        else:
            rewriter = rewriters[point.host]
            name = rewriter.insert_call(conv, region.source, region.replaced)
            for node, remaining in region.removed:
                rewriter.remove(node, remaining)
            # A module that other code calls or reads needs a real copy.
            kept = scope.placement.used_elsewhere(region)
            absorbed += [part for part in modules if part not in kept]
        parts = parts_of_region(scope.module, region, alone=not found.absorbed)
        entry = folded_entry(join(scope.path, name), parts, symbol, owner, region.value.cost, proof.text)
        norms = [more.norm for more in found.absorbed]
        entry = _with_norms(entry, scope.module, found.absorbed)
        folded = [scope.module.get_submodule(path) for norm in norms for path in norm.called_modules]
        self.done.append(Replaced(entry, self.taken_by.get(conv, conv), [*(modules or [host]), *folded]))

    def _scale_transposed(self, scope: Scope, found: Replacement, rewriters: dict[str, ForwardRewriter]) -> None:
        """Fold a region into the transposed convolution that is its source."""
        region = found.region
        path = str(region.source.target)
        old: Any = scope.module.get_submodule(path)
        modules = [old, *map(scope.module.get_submodule, region.called_modules)]
        try:
            new: Any = scale_transposed(old, solve_region(region).map)
        except ReparamError as error:
            self.failed |= dict.fromkeys(modules, str(error))
            return
        proof = NOT_PROVEN
        if self.prove:
            transposed, scaling = _module_in_float64(old, algebra_device(old.weight)), _region_in_float64(region)
            chain = _Chain(region, new)
            proof = prove_region(lambda x: scaling(transposed(x)), image_for_transposed(old), chain)
        if proof.failure:
            self._fail(modules, proof)
            return
        self._insert_in_place(scope, found, new, rewriters)
        steps = [part_of_step(scope.module, step) for step in region.steps if step.computes]
        before, after = (sum(p.numel() for p in part.parameters()) for part in (nn.ModuleList(modules), new))
        # Per input pixel, every weight of a transposed convolution is used once, whatever its stride.
        macs = float(old.weight.numel())
        entry = Folded(
            join(scope.path, path),
            (Part(path, describe_module(old)), *steps),
            describe_module(new),
            parameters_before=before,
            parameters_after=after,
            multiply_adds_before=macs,
            multiply_adds_after=macs,
            proof=proof.text,
        )
        self.done.append(Replaced(entry, new, modules))

    def _insert_in_place(
        self, scope: Scope, found: Replacement, conv: nn.Module, rewriters: dict[str, ForwardRewriter]
    ) -> str:
        """Put the convolution where the first one was, and identities where the others were; return its path."""
        region, whole = found.region, found.insertion.whole
        target, before, name = region.first_convolution, region.source, ""
        nodes = [(step.node, step.computes) for step in region.steps]
        for node, computes in [(target, True), *nodes] if target is before else nodes:
            if node.op == "call_module" and node is target:
                name = str(node.target)
                module = scope.module.get_submodule(name)
                self.substitute(module, _with_attributes_of(module, conv))
            elif node is target and whole:
                name, old = whole, scope.module.get_submodule(whole)
                self.substitute(old, _with_attributes_of(old, conv))
            elif computes and node is target and own_kernel(region, scope.recording) is not None:
                name = scope.recording.owner(node)
                old = scope.module.get_submodule(name)
                taken = _with_kernel_of(old, conv, self.memo)
                self.substitute(old, taken)
                self.taken_by[conv] = taken
            elif computes and node is target:
                name = rewriters[scope.recording.owner(node)].insert_call(conv, before, node)
            elif computes:  # what only reshapes or averages stays: Region.run_in_place proves the chain with it
                self._remove(scope, node, before, rewriters)
            before = node
        return name

    def _remove(self, scope: Scope, node: fx.Node, before: fx.Node, rewriters: dict[str, ForwardRewriter]) -> None:
        """Let a node that returned a function of ``before`` return that as it is."""
        if node.op == "call_module":
            module = scope.module.get_submodule(str(node.target))
            self.substitute(module, _with_attributes_of(module, nn.Identity()))
        else:
            rewriters[scope.recording.owner(node)].remove(node, before)

    def _emit(
        self, symbol: SymbolicTensor, owner: nn.Module, replaced: list[nn.Module], layout: Layout | None = None
    ) -> PlainConv | None:
        """The convolution, trainable if anything that it replaces was; None if a weight overflows the dtype.

        It reads tensors of ``layout``; default: that of the source.
        """
        layout = layout or symbol.source.layout
        parameters = list(owner.parameters())
        # Frozen only if everything that it replaces was frozen.
        trainable = not parameters or any(p.requires_grad for p in parameters)
        try:
            conv = over_axes(symbol.map, layout.spatial)
            return to_module(conv, _reference_tensor(owner), layout, requires_grad=trainable)
        except ReparamError as error:
            self.failed |= dict.fromkeys(replaced, str(error))
            return None

    def _prove(
        self,
        make_before: Callable[[], Callable[[Tensor], Tensor]],
        symbol: SymbolicTensor,
        after: nn.Module,
        shape: tuple[int, ...] | None = None,
    ) -> Proof:
        # ``make_before`` converts weights to float64, so it is only called for a proof.
        if not self.prove:
            return NOT_PROVEN
        return prove_region(make_before(), image_for(symbol.map, symbol.source.layout, shape), after)

    def _fail(self, modules: list[nn.Module], proof: Proof) -> None:
        reason = f"its merged form is not equal to it: {proof.failure}"
        self.failed |= {part: reason for module in modules for part in module.modules()}

    def find_lost(self, plain: nn.Module) -> Reasons:
        """Return modules whose convolution is missing in the copy, because a ``__deepcopy__`` ignored the memo."""
        inside = set(plain.modules())
        lost = [done.modules for done in self.done if done.conv not in inside]
        return {part: "the module around it has its own __deepcopy__" for modules in lost for part in modules}


def _with_kernel_of(old: Module, conv: nn.Module, memo: dict[int, Any]) -> Module:
    """Return a copy of a module that convolves by a function of its ``weight`` and ``bias``, with those of ``conv``."""
    new = object.__new__(type(old))
    state = {name: value for name, value in vars(old).items() if name not in ("_parameters", "_compiled_call_impl")}
    vars(new).update(deep_copy(state, memo, old))
    others = {name: value for name, value in old._parameters.items() if name not in ("weight", "bias")}
    vars(new)["_parameters"] = {**deep_copy(others, memo, old), **conv._parameters}
    return new


def _with_attributes_of(old: nn.Module, new: Module) -> Module:
    """Set ``new`` to the mode of ``old``, and copy plain attributes of ``old`` that other code may read."""
    for name, value in vars(old).items():
        if isinstance(value, _PLAIN_DATA) and not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, copy.copy(value))
    new.training = old.training
    return new


def _reference_tensor(module: nn.Module) -> Tensor:
    """The tensor that determines dtype, device and memory format: the largest kernel, else the first float tensor."""
    # The largest: a 1x1 kernel is contiguous in every memory format.
    kernels = [p for p in module.parameters() if p.dim() == 4]
    like = max(kernels, key=Tensor.numel) if kernels else first_float(module)
    if like is None:
        raise ReparamError("a module without any floating-point tensor cannot become a convolution")
    return like


def _float64_on(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device=device, dtype=torch.float64)


def _module_in_float64(module: nn.Module, device: torch.device) -> Callable[[Tensor], Tensor]:
    shadow = shadow_of(module, _float64_on(device), training=False, compute_weights=True)
    return lambda x: shadow(x.to(device))


def solve(found: Replacement) -> SymbolicTensor:
    """Return the convolution that replaces a region, with the parts of norms that it absorbs."""
    symbol = solve_region(found.region)
    for more in found.absorbed:
        norm = solve_region(more.norm).map
        places, channels = more.places
        factor_O, offset_O = (symbol.map.bias_or_zeros().new_full((symbol.map.out_channels,), x) for x in (1.0, 0.0))
        factor_O[places] = norm.weight.flatten()[channels]
        if more.shifts:
            offset_O[places] = norm.bias_or_zeros()[channels]
        symbol = symbol.like(algebra.shift(algebra.scale(symbol.map, factor_O), offset_O), "batch_norm")
    return symbol


def _in_float64(found: Replacement) -> Callable[[Tensor], Tensor]:
    """Return what a region and the norms after it compute, run as the model runs them."""
    region = _region_in_float64(found.region)
    axis = found.region.value.symbol.layout.axis
    norms = [(more, _region_in_float64(more.norm)) for more in found.absorbed]

    def run(x: Tensor) -> Tensor:
        y = region(x).movedim(axis, 0).clone()
        for more, norm in norms:
            places, channels = more.places
            # The norm takes all of its channels; those of other convolutions are zero.
            given = y.new_zeros((more.norm.value.symbol.map.in_channels, *y.shape[1:]))
            given[channels] = y[places]
            result, zeros = (norm(part.movedim(0, axis)).movedim(axis, 0) for part in (given, torch.zeros_like(given)))
            y[places] = (result if more.shifts else result - zeros)[channels]
        return y.movedim(0, axis)

    return run if norms else region


def _with_norms(entry: Folded, scope: nn.Module, absorbed: Sequence[Absorbed]) -> Folded:
    """Return the entry of a region with the parts of norms that it absorbs."""
    for more in absorbed:
        node, channels = more.norm.exit, more.norm.value.symbol.map.out_channels
        numbers = 0
        if node.op == "call_module":
            numbers = sum(p.numel() for p in scope.get_submodule(str(node.target)).parameters())
        part = part_of_step(scope, more.norm.steps[0], more.norm.recording.owner(node))
        places, _ = more.places
        if len(places) < channels:
            part = Part(part.name, f"{part.description} of {len(places)} of {channels} channels")
        before = entry.parameters_before + numbers * len(places) // channels
        entry = replace(entry, parts=(*entry.parts, part), parameters_before=before)
    return entry


def _region_in_float64(region: Region) -> Callable[[Tensor], Tensor]:
    like = first_float(region.recording.module)
    device = algebra_device(like)
    # Kernels are converted by the mode, while they are used.
    has_float64 = like is not None and like.device == device
    evaluator = Evaluator(region.recording, _float64_on(device), keep_kernels=has_float64)

    def run(x: Tensor) -> Any:
        mode = nullcontext() if like is None or like.dtype is torch.float64 else Float64Mode(like.dtype)
        with mode:
            return region.run(evaluator, x.to(device))

    return run


class _Chain(nn.Module):
    """A chain with the merged convolution in place, between the permutations, reshapes and means that stay."""

    def __init__(self, region: Region, conv: nn.Module) -> None:
        super().__init__()
        self.region, self.conv = region, conv

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chain:
        return _Chain(self.region, copy.deepcopy(self.conv, memo))  # the region refers to the whole model

    def forward(self, x: Tensor) -> Any:
        device = next(self.conv.parameters()).device
        evaluator = Evaluator(self.region.recording, _float64_on(device))
        return self.region.run_in_place(evaluator, self.conv, x.to(device))


def solve_region(region: Region) -> SymbolicTensor:
    """Return the region's convolution with its values, in float64."""
    device = algebra_device(first_float(region.recording.module))
    evaluator = Evaluator(region.recording, _float64_on(device))
    planned = region.value.symbol
    source = SymbolicTensor.of(Source(), planned.map.in_channels, device=device, layout=planned.source.layout)
    # The report gives multiply-adds at these sizes.
    source.source.sizes = planned.source.sizes
    source.source.shape = planned.source.shape
    result: SymbolicTensor = region.run(evaluator, source)
    return result


def to_module(conv: ConvMap, like: Tensor, layout: Layout, *, requires_grad: bool = True) -> PlainConv:
    """Return the module that computes ``conv`` on tensors of a ``layout``: an nn.Linear for rows, else an nn.ConvNd.

    Its dtype, device and memory format are those of the kernel ``like``; the weights are cast once, here.

    Raises:
        ReparamError: a weight is finite in float64 and not in the dtype of ``like``, or there is no module that
            computes ``conv``: a grouped linear map of rows.
        UsageError: ``conv`` does not apply to tensors of that layout.
    """
    if conv.spatial != layout.spatial:
        raise UsageError(f"A map over {conv.spatial} axes does not apply to tensors {layout}.")
    if not conv.spatial and conv.groups > 1:
        raise ReparamError(f"no nn.Linear computes a linear map of rows in {conv.groups} groups")
    conv = emitted_map(conv)
    channels, before, after = (conv.in_channels, conv.out_channels), conv.padding[::2], conv.padding[1::2]
    module: PlainConv
    # The meta device skips the random initialization.
    if conv.spatial:
        padding = before if before == after else "same"
        geometry = (conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups)
        kind, mode = _CONVOLUTIONS[conv.spatial], conv.border or "zeros"
        module = kind(*channels, *geometry, padding_mode=mode, device="meta", dtype=like.dtype)
    else:
        module = nn.Linear(*channels, device="meta", dtype=like.dtype)
    # Assigning to the meta module keeps its constructor arguments and costs no second copy.
    module.weight = nn.Parameter(_dense_weight(conv, like), requires_grad)
    module.bias = nn.Parameter(cast(conv.bias_or_zeros(), like).clone(), requires_grad)
    return module


def _dense_weight(conv: ConvMap, like: Tensor) -> Tensor:
    """The kernel, multiplied out chunk by chunk, so that its float64 form never exists as a whole, and cast once."""
    shape, kept = conv.kernel.shape, torch.contiguous_format
    # A tensor with one channel or one tap is contiguous in both formats; it then counts as contiguous.
    if len(shape) in _CHANNELS_LAST and like.dim() == len(shape) and not like.is_contiguous():
        last = _CHANNELS_LAST[len(shape)]
        kept = last if like.is_contiguous(memory_format=last) else kept
    weight = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=kept)
    for channels, sums in conv.kernel.chunks():
        weight[channels].copy_(sums)
    return _require_finite(weight)


def cast(value: Tensor, like: Tensor) -> Tensor:
    """Return ``value`` in the dtype and on the device of ``like``; raise ReparamError if a number overflows."""
    return _require_finite(value.detach().to(device=like.device, dtype=like.dtype, copy=True))


def _require_finite(cast: Tensor) -> Tensor:
    if not cast.is_meta and cast.numel() and any(bool(torch.isinf(end)) for end in torch.aminmax(cast)):
        raise ReparamError(f"the merged weights do not fit into {str(cast.dtype).removeprefix('torch.')}")
    return cast


def scale_transposed(transposed: _ConvTransposeNd, scaling: ConvMap) -> _ConvTransposeNd:
    """Return ``scaling(transposed(x))`` as one transposed convolution.

    With kernel W (I, O / groups, *K), bias b and ``y ↦ a·y + c`` per channel: the kernel is ``a·W``, where the output
    channels of each group are those of axis 1, and the bias ``a·b + c``. Computed in float64 and cast once.

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
    new.__dict__ = {**vars(transposed), "_parameters": {}}  # copy.copy shares the dictionary of parameters
    for name, value in {"weight": kernel.view(weight_IOK.shape), "bias": offset_O}.items():
        own = cast(value, weight_IOK).clone(memory_format=torch.preserve_format)
        setattr(new, name, nn.Parameter(own, transposed.weight.requires_grad))
    return new


def _detach(plain: nn.Module, path: str) -> None:
    """Remove a dropped submodule from the copy."""
    owner_path, _, name = path.rpartition(".")
    try:
        owner = plain.get_submodule(owner_path)
    except AttributeError:  # the owner itself was replaced
        return
    if isinstance(owner, nn.ModuleDict):
        del owner[name]
    elif not isinstance(owner, (nn.Sequential, nn.ModuleList)):  # these would renumber what follows
        setattr(owner, name, None)
