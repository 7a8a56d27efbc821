"""Where the merged convolution of a region is called, and which forwards change for it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from torch import fx, nn

from repvgg._arguments import per_axis
from repvgg.algebra import ConvMap
from repvgg.collapse.modules import is_inside, join
from repvgg.collapse.recording import Frame, Recording, constants_of, is_constant, leaves
from repvgg.collapse.region import Absorbed, Region
from repvgg.symbolic import things_in


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
        whole: for a chain, path of a module whose forward runs the first convolution and nothing else: it becomes the
            merged one.
    """

    kind: Literal["module", "chain", "call"]
    host: str
    rewritten: frozenset[str] = frozenset()
    inlined: frozenset[str] = frozenset()
    whole: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Replacement:
    """A region and the insertion point of its merged convolution, which also absorbs parts of norms after it."""

    region: Region
    insertion: InsertionPoint
    absorbed: tuple[Absorbed, ...] = ()


def frames_around(region: Region, recording: Recording) -> tuple[Frame, list[list[Frame]]]:
    """Return the innermost frame around all steps of a region, and the frames from each step's own up to it.

    Callers that compute a kernel and put it into a module belong to it: their code would overwrite the new one.
    """
    nodes = [*(step.node for step in region.steps), *_given_constants(region, recording)]
    stacks = [list(recording.frame_of[node].stack()) for node in nodes]
    host = next(frame for frame in stacks[0] if all(frame in stack for stack in stacks))
    return host, [stack[: stack.index(host) + 1] for stack in stacks]


def _given_constants(region: Region, recording: Recording) -> list[fx.Node]:
    """Return the constants that other modules than the one that uses them, and those inside of it, compute."""
    found: list[fx.Node] = []
    for step in region.steps:
        user = recording.frame_of[step.node]
        computed = [n for n in constants_of(step.node) if n.op != "get_attr"]
        found += [n for n in computed if user not in recording.frame_of[n].stack()]
    return found


def insertion_points(
    region: Region, recording: Recording, may_replace: Callable[[Frame], bool]
) -> list[InsertionPoint]:
    """Return the ways to insert the convolution of a region, the best first.

    ``may_replace`` tells whether the module of a frame may become a convolution as a whole.
    """
    found: list[InsertionPoint] = []
    last = recording.frame_of[region.exit]  # inside the host: what stays of a chain may lie outside the module
    steps, read = {step.node for step in region.steps}, [region.read_by_convolution]
    around = [
        frame for frame in last.stack() if _is_whole(steps, read, region.exit, recording, frame) and may_replace(frame)
    ]
    if around:
        found.append(InsertionPoint("module", around[-1].path))
    if region.layout_in_place is not None and not _given_constants(region, recording):
        functions = [step.node for step in region.steps if step.node.op != "call_module" and step.computes]
        owner, replaced = recording.owner(region.first_convolution), ""
        if functions and region.first_convolution is functions[0]:
            first, frame = functions[0], recording.frame_of[functions[0]]
            if own_kernel(region, recording):
                functions = functions[1:]
            elif _is_whole({first}, first.all_input_nodes, first, recording, frame) and may_replace(frame):
                functions, replaced = functions[1:], frame.path
        changed = frozenset(recording.owner(node) for node in functions)
        found.append(InsertionPoint("chain", owner, changed, whole=replaced))
    elif (point := call_in_new_forward(region, recording)) is not None:
        found.append(point)
    return found


def call_in_new_forward(region: Region, recording: Recording) -> InsertionPoint | None:
    """Return the call of the convolution of a region in the forward around it; None if it is not one convolution."""
    if not region.value.symbol.is_convolution:
        return None
    host, stacks = frames_around(region, recording)
    rewritten = {frame.path for stack in stacks for frame in stack}
    return InsertionPoint("call", host.path, frozenset(rewritten), frozenset(rewritten - {host.path}))


def _is_whole(
    nodes: set[fx.Node], inputs: Collection[fx.Node | None], output: fx.Node, recording: Recording, frame: Frame
) -> bool:
    """Whether a module computes ``output`` from its only input, one of ``inputs``, by ``nodes`` and own constants."""
    is_of_input = not frame.kwargs and len(frame.args) == 1 and frame.args[0] in inputs
    if not is_of_input or frame.output is not output:
        return False
    ran = set(frame.nodes())
    constants = {n for node in nodes & ran for n in constants_of(node)}
    if any(n not in ran for n in constants if n.op != "get_attr"):
        return False
    read = [str(n.target) for n in constants if n.op == "get_attr"]
    elsewhere = [attrgetter(path)(recording.module) for path in read if not is_inside(path, frame.path)]
    if elsewhere:  # perhaps shared ones
        parts = recording.module.get_submodule(frame.path).modules()
        own = {id(t) for part in parts for t in things_in((part._parameters, part._buffers, vars(part)))}
        if any(id(tensor) not in own for tensor in elsewhere):
            return False
    return all(n in nodes or is_constant(n) for n in ran)


def _has_geometry(conv: ConvMap, given: dict[str, Any]) -> bool:
    """Whether a merged convolution has the geometry that the arguments of a function say."""
    axes = conv.spatial
    kernel = given["weight"].meta.get("shape", ()) if isinstance(given.get("weight"), fx.Node) else ()
    values = [given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    if any(isinstance(leaf, (fx.Node, str)) for leaf in leaves(values)):
        return False
    stride, padding, dilation = (per_axis(value, axes) for value in values)
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
    if not _has_geometry(region.value.symbol.map, given):
        return None
    path = recording.owner(node)
    module = recording.module.get_submodule(path)

    def is_own(name: str) -> bool:
        """Whether an argument is the parameter of that name, and nothing else reads it."""
        value = given.get(name)
        if not isinstance(value, fx.Node) or value.op != "get_attr" or value.target != join(path, name):
            return False
        return len(value.users) == 1 and name in module._parameters

    has_no_bias = not isinstance(given.get("bias"), fx.Node) and module._parameters.get("bias", path) is None
    return module if is_own("weight") and (has_no_bias or is_own("bias")) else None
