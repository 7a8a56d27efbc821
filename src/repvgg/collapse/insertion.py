"""Where the merged convolution of a region is called, and which forwards change for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from repvgg.algebra import ConvMap
from repvgg.collapse.recording import Frame, Recording, is_constant, leaves
from repvgg.collapse.region import Absorbed, Region
from repvgg.symbolic.handlers import numbers


@dataclass(frozen=True)
class InsertionPoint:
    """Where the merged convolution of a region is called, and which forwards change for it.

    Attributes:
        kind: "module": it replaces a module as a whole. "chain": it replaces the first convolution of a chain, and
            the other steps become identities, each in its own module. "call": one forward calls it in place of the
            region.
        host: path of the module that it replaces, or whose forward calls it.
        rewritten: paths of the modules that get a new forward, or are inlined into that of their caller.
        inlined: the subset of them that is inlined.
    """

    kind: Literal["module", "chain", "call"]
    host: str
    rewritten: frozenset[str] = frozenset()
    inlined: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False, repr=False)
class Replacement:
    """A region and the insertion point of its merged convolution, which also absorbs parts of norms after it."""

    region: Region
    insertion: InsertionPoint
    absorbed: tuple[Absorbed, ...] = ()


def frames_around(region: Region, recording: Recording) -> tuple[Frame, list[list[Frame]]]:
    """Return the innermost frame around all steps of a region, and the frames from each step's own up to it."""
    stacks = [list(recording.frame_of[step.node].stack()) for step in region.steps]
    host = next(frame for frame in stacks[0] if all(frame in stack for stack in stacks))
    return host, [stack[: stack.index(host) + 1] for stack in stacks]


def insertion_points(
    region: Region, recording: Recording, may_replace: Callable[[Frame], bool]
) -> list[InsertionPoint]:
    """Return the ways to insert the convolution of a region, the best first.

    ``may_replace`` tells whether the module of a frame may become a convolution as a whole.
    """
    host, stacks = frames_around(region, recording)
    found: list[InsertionPoint] = []
    last = recording.frame_of[region.exit]  # inside the host: what stays of a chain may lie outside the module
    whole = [frame for frame in last.stack() if _is_whole(region, frame) and may_replace(frame)]
    if whole:
        found.append(InsertionPoint("module", whole[-1].path))
    if region.layout_in_place is not None:
        functions = [step.node for step in region.steps if step.node.op != "call_module" and step.computes]
        if functions and region.first_convolution is functions[0] and own_kernel(region, recording):
            functions = functions[1:]
        owner = recording.owner(region.first_convolution)
        found.append(InsertionPoint("chain", owner, frozenset(recording.owner(node) for node in functions)))
    elif region.value.symbol.is_convolution:
        rewritten = {frame.path for stack in stacks for frame in stack}
        found.append(InsertionPoint("call", host.path, frozenset(rewritten), frozenset(rewritten - {host.path})))
    return found


def _is_whole(region: Region, frame: Frame) -> bool:
    """Whether a module computes the convolution of a region from its only input, and nothing else."""
    read = region.read_by_convolution
    if frame.kwargs or len(frame.args) != 1 or frame.args[0] is not read or frame.output is not region.exit:
        return False
    inside = {step.node for step in region.steps}
    return all(node in inside or is_constant(node) for node in frame.nodes())


def _has_geometry(conv: ConvMap, given: dict[str, Any]) -> bool:
    """Whether a merged convolution has the geometry that the arguments of a function say."""
    axes = conv.spatial
    kernel = given["weight"].meta.get("shape", ()) if isinstance(given.get("weight"), fx.Node) else ()
    values = [given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    if any(isinstance(leaf, (fx.Node, str)) for leaf in leaves(values)):
        return False
    stride, padding, dilation = (numbers(value, axes) for value in values)
    sides = tuple(side for side in padding for _ in (0, 1))
    expected = (tuple(kernel[2:]), stride, sides, dilation, given.get("groups", 1))
    return expected == (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)


def own_kernel(region: Region, recording: Recording) -> nn.Module | None:
    """Return the module whose ``weight`` and ``bias`` the first step of a region convolves with, if it may take others.

    Its forward then stays as it is, whatever it does before and after the convolution.
    """
    node = region.first_convolution
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in ("conv1d", "conv2d", "conv3d"):
        return None
    given: dict[str, Any] = dict(
        zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), node.args, strict=False)
    )
    given |= node.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if not _has_geometry(region.value.symbol.map, given):
        return None
    path = recording.owner(node)
    module = recording.module.get_submodule(path)
    prefix = f"{path}." if path else ""
    is_own = isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target == f"{prefix}weight"
    if (
        weight is None
        or not is_own
        or len(weight.users) > 1
        or "weight" not in module._parameters
        or "bias" not in module._parameters
    ):
        return None
    if isinstance(bias, fx.Node):
        is_own = bias.op == "get_attr" and bias.target == f"{prefix}bias" and len(bias.users) == 1
    return module if is_own and (isinstance(bias, fx.Node) or module._parameters["bias"] is None) else None
