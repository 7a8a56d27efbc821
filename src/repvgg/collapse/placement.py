"""Which regions of a recording may be merged, and where their convolutions go."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from repvgg._calls import signature_of
from repvgg.collapse.code import has_public_methods
from repvgg.collapse.emit import why_not_emitted
from repvgg.collapse.insertion import InsertionPoint, call_in_new_forward, frames_around, insertion_points
from repvgg.collapse.matching import canonical_form, is_same_region
from repvgg.collapse.methods import separating_method
from repvgg.collapse.modules import computes_weights, has_own_hooks, held_elsewhere, is_inside, is_leaf
from repvgg.collapse.recording import DRAWS_OUTSIDE_PYTORCH, Frame, is_constant, leaves
from repvgg.collapse.region import Region
from repvgg.collapse.validity import Validity


class Placement:
    """Decides for each region whether and where its convolution may be inserted.

    Args:
        validity: the recording, and what holds in other calls.
        excluded: paths of modules that must stay, and why.
        unread: paths of modules that are removed.
    """

    def __init__(self, validity: Validity, excluded: dict[str, str], unread: Collection[str]) -> None:
        self.validity, self.excluded, self.unread = validity, excluded, unread
        self.recording, self.frames = validity.recording, validity.frames
        self._frozen: dict[str, str | None] = {}

    # What must stay

    @cached_property
    def _shared(self) -> set[str]:
        """Paths of modules that one forward calls more than once, or that several forwards call."""
        shared: set[str] = set()
        callers: dict[str, set[str]] = defaultdict(set)
        for frame in self.recording.root.frames():
            called = Counter(path for path, _ in frame.calls())
            shared |= {path for path, times in called.items() if times > 1}
            for path in called:
                callers[path].add(frame.path)
        shared |= {path for path, modules in callers.items() if len(modules) > 1}
        if not self.validity.trusted:
            elsewhere = held_elsewhere(self.recording.module)
            shared |= {path for path, part in self.recording.module.named_modules() if part in elsewhere}
        return shared

    @cached_property
    def _identities(self) -> set[str]:
        """Paths of called leaf modules that return their input in eval mode: a chain may replace shared ones too."""
        modules = ((path, self.recording.module.get_submodule(path)) for _, path in self.recording.calls())
        return {path for path, part in modules if isinstance(part, (nn.Identity, _DropoutNd))}

    @cached_property
    def _read_by_others(self) -> set[str]:
        """Paths of leaf modules whose tensors a forward reads past them."""
        reads = (self.recording.constant(node) for node in self.recording.graph.nodes if node.op == "get_attr")
        read = {id(tensor) for tensor in reads}  # tied parameters are one tensor
        parts = {path: self.recording.module.get_submodule(path) for _, path in self.recording.calls()}
        return {
            path
            for path, part in parts.items()
            if not computes_weights(part)  # torch's own hooks read them
            and any(id(tensor) in read for tensor in (*part._parameters.values(), *part._buffers.values()))
        }

    def used_elsewhere(self, region: Region) -> set[nn.Module]:
        """Return the modules of a region that other code calls, or reads the parameters of."""
        paths = {path for path in region.called_modules if path in self._shared or path in self._read_by_others}
        return {self.recording.module.get_submodule(path) for path in paths}

    def fixed_nodes(self) -> dict[fx.Node, str]:
        """Return the nodes that must stay as they are, with the reason."""
        found: dict[fx.Node, str] = {}
        for path, frames in self.frames.items():
            # Later calls of a module run the code that the first call shows.
            for frame in frames[1:]:
                found |= dict.fromkeys(frame.nodes(), "it is used more than once")
            if path in self.excluded:
                nodes = (item for item in frames[0].items if isinstance(item, fx.Node))
                found |= dict.fromkeys(nodes, self.excluded[path])
        for node, path in self.recording.calls():
            part = self.recording.module.get_submodule(path)
            if path in self._shared and isinstance(part, _ConvTransposeNd):
                found[node] = "it is used more than once"  # what follows could only be folded into it
            elif has_own_hooks(part):
                found[node] = "it has hooks"
            elif not is_leaf(part):
                found[node] = "it is a compiled script"
            elif path in self.excluded:
                found[node] = self.excluded[path]
        unread = (node for frame in self.recording.root.frames() if frame.path in self.unread for node in frame.nodes())
        unread_leaves = (node for node, path in self.recording.calls() if path in self.unread)
        found |= dict.fromkeys((*unread, *unread_leaves), "no output depends on its result")
        if not self.validity.trusted:
            text = "the shape of the input is not known, and a batch norm alone does not determine it: pass inputs="
            found |= dict.fromkeys(self._norms_of_unknown_rank(), text)
        return found

    def _norms_of_unknown_rank(self) -> Iterator[fx.Node]:
        """Yield norms over axis 1 of what only layers for any number of axes have computed from the input."""
        known: set[fx.Node] = set()  # tensors whose number of axes a layer determines
        norms: list[fx.Node] = []
        for node in self.recording.graph.nodes:
            part = self.recording.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            name = getattr(node.target, "__name__", "")
            if isinstance(part, (_ConvNd, nn.BatchNorm2d, nn.BatchNorm3d)) or name.startswith("conv"):
                known |= {node, *node.all_input_nodes}
            elif any(n in known for n in node.all_input_nodes):
                known.add(node)
            elif isinstance(part, nn.BatchNorm1d) or (name == "batch_norm" and not is_constant(node)):
                norms.append(node)
        return (node for node in norms if not any(n in known for n in node.all_input_nodes))

    def boundaries(self) -> dict[fx.Node, str]:
        """Return the tensors that go into and come out of modules whose calls must keep both, with the reason."""
        found: dict[fx.Node, str] = {}
        for path, frames in self.frames.items():
            part = self.recording.module.get_submodule(path)
            reason = "has hooks" if has_own_hooks(part) else "is used more than once" if path in self._shared else None
            if reason and frames[0].parent is not None:
                text = f"nothing merges across the boundary of {path!r}: it {reason}"
                for frame in frames:
                    inside = leaves((frame.args, frame.kwargs, frame.output))
                    found |= {node: text for node in inside if isinstance(node, fx.Node) and node.op != "get_attr"}
        return found

    # Where convolutions go

    def find(self, region: Region) -> InsertionPoint | str:
        """Return where the convolution of a region goes, or why it cannot go anywhere."""
        first: str | None = None
        for point in insertion_points(region, self.recording, self._may_replace):
            reason = self._why_not(region, point)
            if reason is None:
                return point
            first = first or reason
            # A new forward does not call the method that runs a part of a chain: the plain model can refuse it.
            if point.kind == "chain" and self.validity.trusted and self._has_separating_method(region):
                instead = call_in_new_forward(region, self.recording)
                if instead is not None and self._why_not(region, instead) is None:
                    return instead
        return first or "there is no place for it"

    def _has_separating_method(self, region: Region) -> bool:
        _, stacks = frames_around(region, self.recording)
        touched = {frame.path for stack in stacks for frame in stack}
        return any(separating_method(region, self.recording, path, others=False) for path in touched)

    def why_not_absorbed(self, region: Region) -> str | None:
        """Return why the convolutions in a region may not absorb the norm at its end, or None."""
        paths = [*region.called_modules]
        if any(path in self._shared for path in paths):
            return "it is used more than once, or a convolution before it"
        if any(path in self._read_by_others for path in paths):
            return "its parameters, or those of a convolution before it, are read by something else"
        owner = self.recording.owner(region.exit)
        if region.exit.op != "call_module":
            reason = self._why_frozen(owner)
            if reason is None and (clause := why_not_emitted(self.recording, owner, ())):
                reason = f"the forward of {owner or 'the model'} {clause}"
            if reason is not None:
                return reason
        return self._why_conflicting(region, InsertionPoint("chain", owner))

    def _may_replace(self, frame: Frame) -> bool:
        """Whether a module may become a convolution: only its forward is ever called, with one argument."""
        path = frame.path
        part = self.recording.module.get_submodule(path)
        if path in self._shared or path in self.excluded or path in self.recording.changed or has_own_hooks(part):
            return False
        if self.recording.is_used_outside(path):
            return False
        parameters = signature_of(part)
        if type(part) is nn.Sequential:
            return True
        if parameters is None or has_public_methods(type(part)):
            return False
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [p.kind in kinds and p.default is p.empty for p in parameters.parameters.values()] == [True]

    def _why_not(self, region: Region, point: InsertionPoint) -> str | None:
        """Return why an insertion would change what some forward computes, or None."""
        first = region.first_convolution
        changed = [*region.called_modules, *([str(first.target)] if first.op == "call_module" else [point.whole])]
        if point.kind == "chain" and any(path in self._shared - self._identities for path in changed):
            return "it is used more than once"
        if point.kind == "chain" and any(path in self._read_by_others for path in changed):
            return "its parameters are read by something else"
        for path in sorted(point.rewritten):
            reason = self._why_frozen(path)
            if reason:
                return reason
        for path in sorted(point.rewritten - point.inlined):
            reason = why_not_emitted(self.recording, path, point.inlined)
            if reason:
                return f"the forward of {path or 'the model'} {reason}"
        return self._why_conflicting(region, point)

    def _why_frozen(self, path: str) -> str | None:
        """Return why a module cannot get a new forward, or None."""
        if path not in self._frozen:
            reason = self.excluded.get(path) or self._find_why_frozen(path)
            self._frozen[path] = reason
        return self._frozen[path]

    def _find_why_frozen(self, path: str) -> str | None:
        around = f"the forward of {path or 'the model'}"
        frame, *others = self.frames[path]
        if frame.caveats:
            return f"{around} {frame.caveats[0]}"
        # What a module stores itself, its call in a new forward around it still stores.
        stores = path in self.recording.changed
        if stores or any(is_inside(changed, path) for changed in self.recording.changed_by_others):
            return f"{around} stores something in an attribute"
        mine = canonical_form(frame)
        if any(canonical_form(other) != mine for other in others):
            return f"{around} computes something else when it is called again"
        similar = self.validity.similar
        again = None if similar is None else similar.first_calls.get(path)
        if again is None:
            return f"{around} could not be run on inputs of another size"
        if canonical_form(again) != mine:
            return f"{around} computes with numbers that depend on the size of its input"
        text = "takes optional arguments that change what it computes"
        return self.validity.why_unsafe(path, lambda other: canonical_form(other.root, path) != mine, text)

    def _why_conflicting(self, region: Region, point: InsertionPoint) -> str | None:
        """Why a merged region would change what a forward computes in another call of the model."""
        host, stacks = frames_around(region, self.recording)
        touched = {frame.path: frame for stack in stacks for frame in stack}
        # Only a chain changes the modules themselves; else others may go on calling them.
        unchanged = frozenset(self._identities if point.kind == "chain" else self._shared)
        for path, frame in touched.items():
            # Below the host, and in it, code runs a part of the region by itself.
            if is_inside(path, host.path) and (reason := self.validity.why_switched(path)):
                return reason
            if DRAWS_OUTSIDE_PYTORCH in frame.caveats:
                return f"the forward of {path or 'the model'} {DRAWS_OUTSIDE_PYTORCH}"
            for other in self.frames[path][1:]:
                if not is_same_region(region, self.recording, frame=other, unchanged=unchanged):
                    return f"{path} computes something else when it is called again"
        if self.validity.similar is not None and not is_same_region(region, self.validity.similar, unchanged=unchanged):
            return f"the forward of {host.path or 'the model'} branches on the size of its input"
        if reason := self._why_conflicting_methods(region, point, touched):
            return reason
        reasons = (self._why_conflicting_variants(region, path, unchanged) for path in touched)
        return next(filter(None, reasons), None)

    def _why_conflicting_variants(self, region: Region, path: str, unchanged: frozenset[str]) -> str | None:
        """Why another branch of the forward of a module would compute something else afterwards."""
        text = "branches on its input" if self.frames[path][0].decisions else "takes optional arguments"
        return self.validity.why_unsafe(
            path, lambda other: not is_same_region(region, other, path, unchanged=unchanged), text
        )

    def _why_conflicting_methods(self, region: Region, point: InsertionPoint, touched: dict[str, Frame]) -> str | None:
        """Why another method of a module would compute something else afterwards."""
        for path in touched:
            # A method that a new forward no longer calls can be refused instead.
            if not self.validity.trusted or point.kind == "chain":
                method = separating_method(region, self.recording, path, others=not self.validity.trusted)
                if method:
                    hint = "" if self.validity.trusted else ": pass inputs="
                    return f"the method {method!r} of {path or 'the model'} calls a part of it on its own{hint}"
        return None
