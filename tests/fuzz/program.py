"""Descriptions of random networks: frozen values with shapes, whose repr is the code that makes them.

A :class:`Program` is a list of steps. Values are numbered: first the inputs, then what each step returns, in order. A
printed program can be pasted into a test.
"""

from dataclasses import dataclass, fields

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
Pair = tuple[int, int]


class Printed:
    """Prints itself as the call that makes it, without the fields that have their default."""

    def __repr__(self) -> str:
        shown = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"


@dataclass(frozen=True)
class Shape:
    """Channels, and (height, width) for each of the image sizes that the network is run on."""

    channels: int
    sizes: tuple[Pair, ...]


@dataclass(frozen=True, repr=False)
class Conv(Printed):
    inputs: int
    outputs: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    mode: str = "zeros"

    def shape(self, x: Shape) -> Shape | None:
        if x.channels != self.inputs or self.inputs % self.groups or self.outputs % self.groups:
            return None
        if not all(pads_fit(size, self.padding, self.mode) for size in x.sizes):
            return None
        return _windows(x, self.outputs, self.kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True, repr=False)
class Tied(Printed):
    """A new convolution with the weight of an earlier step's."""

    step: int
    conv: Conv

    def shape(self, x: Shape) -> Shape | None:
        return self.conv.shape(x)


@dataclass(frozen=True, repr=False)
class Norm(Printed):
    """A batch norm: "batch", "sync", "frozen", or "untracked", which also normalizes by the batch in eval mode."""

    channels: int
    kind: str = "batch"
    affine: bool = True

    def shape(self, x: Shape) -> Shape | None:
        return x if x.channels == self.channels else None


@dataclass(frozen=True, repr=False)
class Scale(Printed):
    """A learned factor per channel, or one for all."""

    channels: int

    def shape(self, x: Shape) -> Shape | None:
        return x if self.channels in (1, x.channels) else None


@dataclass(frozen=True, repr=False)
class Times(Printed):
    """A product with a Python number."""

    factor: float

    def shape(self, x: Shape) -> Shape | None:
        return x


@dataclass(frozen=True, repr=False)
class Pool(Printed):
    kernel: int
    stride: int = 1
    padding: int = 0
    kind: str = "avg"

    def shape(self, x: Shape) -> Shape | None:
        if self.padding > self.kernel // 2:
            return None
        return _windows(x, x.channels, *(((n, n)) for n in (self.kernel, self.stride, self.padding)))


@dataclass(frozen=True, repr=False)
class Pad(Printed):
    """Zeros at the left, right, top, bottom, as a module or a function."""

    sides: tuple[int, int, int, int]
    functional: bool = False

    def shape(self, x: Shape) -> Shape | None:
        left, right, top, bottom = self.sides
        return Shape(x.channels, tuple((h + top + bottom, w + left + right) for h, w in x.sizes))


@dataclass(frozen=True, repr=False)
class Same(Printed):
    """An operation on one input that keeps its shape: "identity", "dropout", or a non-linearity."""

    name: str = "identity"

    def shape(self, x: Shape) -> Shape | None:
        return x


@dataclass(frozen=True, repr=False)
class Slice(Printed):
    start: int
    stop: int

    def shape(self, x: Shape) -> Shape | None:
        return Shape(self.stop - self.start, x.sizes) if 0 <= self.start < self.stop <= x.channels else None


@dataclass(frozen=True, repr=False)
class Merge(Printed):
    """Several tensors of one shape to one: "add" (from the left), "nested" (from the right), "sub", "+=", "-="."""

    how: str = "add"

    def shape(self, *xs: Shape) -> Shape | None:
        return xs[0] if len(set(xs)) == 1 and len(xs) > 1 else None


@dataclass(frozen=True, repr=False)
class Cat(Printed):
    def shape(self, *xs: Shape) -> Shape | None:
        return Shape(sum(x.channels for x in xs), xs[0].sizes) if len({x.sizes for x in xs}) == 1 else None


@dataclass(frozen=True, repr=False)
class Again(Printed):
    """Another call of the module of an earlier step."""

    step: int


@dataclass(frozen=True, repr=False)
class Chain(Printed):
    """An ``nn.Sequential`` of layers."""

    layers: tuple[Conv | Norm | Scale | Pool | Pad | Same, ...]

    def shape(self, x: Shape) -> Shape | None:
        out: Shape | None = x
        for layer in self.layers:
            out = layer.shape(out) if out is not None else None
        return out


@dataclass(frozen=True, repr=False)
class Block(Printed):
    """A submodule with its own forward."""

    program: "Program"

    def shape(self, *xs: Shape) -> Shape | None:
        """Return the shape of its first value; ``None`` if it cannot be called with these."""
        out = shapes_of(self.program, *xs)
        return out[self.program.outputs[0]] if out else None


Op = Conv | Tied | Norm | Scale | Times | Pool | Pad | Same | Slice | Merge | Cat | Again | Chain | Block


@dataclass(frozen=True)
class Step:
    """One call: the operation, and the indices of the values that it reads."""

    op: Op
    reads: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Step({self.op!r}, {self.reads!r})"


@dataclass(frozen=True)
class Program:
    """A network: its number of inputs, its steps, and the indices of the values that it returns."""

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    flat: bool = False

    def __repr__(self) -> str:
        steps = "".join(f"{step!r}, " for step in self.steps)
        return f"Program({self.inputs}, ({steps}), {self.outputs!r}{', flat=True' if self.flat else ''})"


def module_step(steps: tuple[Step, ...], op: Op) -> Op:
    """Return the op whose module ``op`` calls: itself, or that of an earlier step."""
    return steps[op.step].op if isinstance(op, Again) else op


def returned(op: Op) -> int:
    """Return how many values a step with this op produces."""
    return len(op.program.outputs) if isinstance(op, Block) else 1


def shapes_of_step(steps: tuple[Step, ...], op: Op, xs: list[Shape]) -> list[Shape] | None:
    """Return the shapes of the outputs of ``op``, or ``None`` if it cannot be called with these inputs."""
    op = module_step(steps, op)
    if not isinstance(op, Block):
        out = op.shape(*xs)
        return None if out is None else [out]
    inner = shapes_of(op.program, *xs)
    return [inner[i] for i in op.program.outputs] if inner else None


def shapes_of(program: Program, *inputs: Shape) -> list[Shape] | None:
    """Return the shapes of all values of a program, or ``None`` if a step does not fit."""
    shapes = list(inputs)
    for step in program.steps:
        out = shapes_of_step(program.steps, step.op, [shapes[i] for i in step.reads])
        if out is None:
            return None
        shapes.extend(out)
    return shapes


def pads_fit(size: Pair, padding: Pair, mode: str) -> bool:
    """Whether an image of this size can be padded like this: a reflection needs one pixel more than it adds."""
    spare = {"reflect": 1, "circular": 0}.get(mode)
    return spare is None or all(p + spare <= n for p, n in zip(padding, size, strict=True))


def _windows(
    x: Shape, channels: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)
) -> Shape | None:
    sizes = tuple(
        tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        )
        for size in x.sizes
    )
    return Shape(channels, sizes) if min(map(min, sizes)) >= 1 else None  # type: ignore[arg-type]
