"""Hypothesis strategies: random programs of common network patterns, with shapes that always fit."""

from itertools import product
from math import gcd

from hypothesis import strategies as st

from tests.fuzz.geometry import USUAL, axes, axis_choices, large_enough, strides_to
from tests.fuzz.program import (
    PADDING_MODES,
    Again,
    Block,
    Cat,
    Chain,
    Conv,
    Merge,
    Norm,
    Op,
    Pad,
    Pool,
    Program,
    Same,
    Scale,
    Shape,
    Slice,
    Step,
    Tied,
    Times,
    pads_fit,
    shapes_of_step,
)

SIZES = ((13, 17), (16, 11))
IMAGE = Shape(3, SIZES)
WIDTHS = (4, 6, 2, 3)
MOST_CHANNELS = 12

#: Not drawn because of a known defect: names of patterns and of ``Same``, kinds of norms and merges.
EXCLUDED: frozenset[str] = frozenset()

NORMS = (*["batch"] * 10, "sync", "sync", "frozen", "frozen", "untracked")
SAMES = ("identity", "dropout", "relu", "relu_", "sigmoid", "hardswish", "f.relu", "f.relu_", "f.tanh")
MERGES = ("add", "add", "add", "nested", "sub", "+=", "-=")
SIDES = ((1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 2, 1), (2, 1, 0, 0), (0, 0, -1, 0))


def allowed(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name not in EXCLUDED]


class Builder:
    """Build a program step by step, with choices from ``draw``."""

    def __init__(self, draw, inputs: tuple[Shape, ...], depth: int):
        self.draw, self.inputs, self.depth = draw, inputs, depth
        self.shapes: list[Shape] = list(inputs)
        self.steps: list[Step] = []

    def pick(self, options):
        return self.draw(st.sampled_from(list(options)))

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def put(self, op: Op, *reads: int) -> int:
        """Append a step; return the index of its first value."""
        out = shapes_of_step(tuple(self.steps), op, [self.shapes[i] for i in reads])
        assert out, (op, reads)
        self.steps.append(Step(op, reads))
        self.shapes.extend(out)
        return len(self.shapes) - len(out)

    def value(self) -> int:
        """Pick a value, usually the newest."""
        last = len(self.shapes) - 1
        return self.pick([last, last, *range(last, -1, -1)])

    # layers

    def conv(self, x: Shape, to: Shape | None = None, channels: int | None = None) -> Conv | None:
        """Return a convolution, to a given shape if any; ``None`` if there is none."""
        outputs = to.channels if to else channels or self.pick((*WIDTHS, x.channels))
        strides = strides_to(x, to)
        if not strides:
            return None
        stride = self.pick(strides)
        rows, columns = (axis_choices(ns, s, outs) for ns, s, outs in axes(x, to, stride))
        usual = [choice for choice in rows if choice in columns and choice in USUAL]
        if usual and self.pick((True, True, False)):
            kernel, padding, dilation = ((n, n) for n in self.pick(usual))
            return Conv(x.channels, outputs, kernel, stride, padding, dilation, bias=self.maybe())
        kernel, padding, dilation = zip(*self.rows_and_columns(rows, columns), strict=True)
        common = gcd(x.channels, outputs)
        groups = self.pick([1, *(g for g in (1, 2, 3, common) if common % g == 0)])
        modes = [mode for mode in PADDING_MODES if all(pads_fit(size, padding, mode) for size in x.sizes)]
        mode = self.pick(["zeros", "zeros", "zeros", *modes])
        return Conv(x.channels, outputs, kernel, stride, padding, dilation, groups, self.maybe(), mode)

    def rows_and_columns(self, rows, columns):
        """Pick kernel, padding and dilation for height and width; equal or not."""
        both = [choice for choice in rows if choice in columns]
        return [self.pick(both)] * 2 if both and self.maybe() else (self.pick(rows), self.pick(columns))

    def norm(self, channels: int) -> Norm:
        kind = self.pick(allowed(NORMS))
        return Norm(channels, kind, kind == "frozen" or self.pick((True, True, False)))

    def same(self) -> Same:
        return Same(self.pick(allowed(SAMES)))

    def layer(self, x: Shape) -> Op:
        """Pick any operation on one input."""
        kinds = ("conv", "conv", "norm", "norm", "scale", "times", "pool", "pad", "same", "slice")
        match self.pick(allowed(kinds)):
            case "norm":
                return self.norm(x.channels)
            case "scale":
                return Scale(self.pick((x.channels, 1)))
            case "times":
                return Times(self.pick((0.5, -2.0)))
            case "pool":
                kernel = self.pick((3, 2))
                pool = Pool(kernel, self.pick((1, 2)), self.pick(range(kernel // 2 + 1)), self.pick(("avg", "max")))
                return pool if large_enough(pool.shape(x)) else Same()
            case "pad":
                pad = Pad(self.pick(SIDES), self.maybe())
                return pad if large_enough(pad.shape(x)) else Same()
            case "same":
                return self.same()
            case "slice":
                start = self.pick(range(x.channels))
                return Slice(start, self.pick(range(x.channels, start, -1)))
        return self.conv(x) or Same()

    # patterns: each appends some steps, or none if it does not fit

    def one(self) -> None:
        at = self.value()
        self.put(self.layer(self.shapes[at]), at)

    def conv_norm(self) -> None:
        at = self.value()
        conv = self.conv(self.shapes[at])
        if conv:
            at = self.put(conv, at)
            self.put(self.norm(conv.outputs), at)
            if self.maybe():
                self.put(self.same(), at + 1)

    def norm_conv(self) -> None:
        at = self.value()
        at = self.put(self.norm(self.shapes[at].channels), at)
        conv = self.conv(self.shapes[at])
        if conv:
            self.put(conv, at)

    def chain(self) -> None:
        """An ``nn.Sequential``."""
        at = self.value()
        x, layers = self.shapes[at], []
        for _ in range(self.pick((2, 3, 4))):
            op = self.layer(x)
            if isinstance(op, (Conv, Norm, Scale, Pool, Same)) and not getattr(op, "name", "").startswith("f."):
                layers.append(op)
                x = op.shape(x)
        if layers:
            self.put(Chain(tuple(layers)), at)

    def branches(self) -> None:
        """Two to four branches from one value to one shape, summed."""
        at = self.value()
        first = self.conv(self.shapes[at])
        if first:
            target = first.shape(self.shapes[at])
            ends = [self.put(first, at)] + [self.branch(at, target) for _ in range(self.pick((1, 2, 3)))]
            self.put(Merge(self.pick(allowed(MERGES))), *ends)

    def residual(self) -> None:
        at = self.value()
        end = self.branch(at, self.shapes[at])
        self.put(Merge(self.pick(allowed(MERGES))), *self.pick(((at, end), (end, at))))

    def join(self) -> None:
        """Combine any two values of one shape."""
        pairs = [(a, b) for a, b in product(range(len(self.shapes)), repeat=2) if self.shapes[a] == self.shapes[b]]
        self.put(Merge(self.pick(allowed(MERGES))), *self.pick(pairs[::-1]))

    def cat(self) -> None:
        at = self.value()
        others = [i for i, x in enumerate(self.shapes) if x.sizes == self.shapes[at].sizes]
        parts = [at, *(self.pick(others) for _ in range(self.pick((1, 2))))]
        if sum(self.shapes[i].channels for i in parts) <= MOST_CHANNELS:
            self.put(Cat(), *parts)

    def again(self) -> None:
        """Call an earlier module again, or a convolution that shares an earlier one's weight."""
        found = [
            (op, (at,))
            for i, step in enumerate(self.steps)
            for at, shape in enumerate(self.shapes)
            for op in repeats(i, step.op)
            if large_enough((shapes_of_step(tuple(self.steps), op, [shape]) or [None])[0])
        ]
        if found:
            op, reads = self.pick(found)
            self.put(op, *reads)

    def block(self) -> None:
        """A submodule with its own forward, on one or two values."""
        if self.depth:
            reads = tuple(self.value() for _ in range(self.pick((1, 1, 2))))
            inner = Builder(self.draw, tuple(self.shapes[i] for i in reads), self.depth - 1)
            inner.write(self.pick((1, 2, 3)))
            self.put(Block(inner.program(self.pick((1, 1, 2)))), *reads)

    # a branch to a given shape

    def branch(self, at: int, target: Shape) -> int:
        """Append linear steps to a value of this shape, in a submodule or not; return the last value's index."""
        if not self.depth or self.pick((True, False, False)) is False:
            return self.bare_branch(at, target)
        inner = Builder(self.draw, (self.shapes[at],), 0)
        end = inner.bare_branch(0, target)
        return self.put(Block(Program(1, tuple(inner.steps), (end,))), at) if end else at

    def bare_branch(self, at: int, target: Shape) -> int:
        x = self.shapes[at]
        kinds = ["conv", "conv", "pointwise", "padded", "pool", "nested"]
        kinds += ["none", "norm", "scale"] if x == target else []
        kind = self.pick(allowed(tuple(kinds)))
        if kind == "none":
            return at
        if kind == "norm":
            return self.put(self.norm(x.channels), at)
        if kind == "scale":
            return self.put(Scale(self.pick((x.channels, 1))), self.put(self.norm(x.channels), at))
        if kind == "nested":
            ends = [self.finish(at, target), self.finish(at, target)]
            return self.put(Merge(self.pick(allowed(MERGES))), *ends)
        if kind == "pointwise":
            at = self.put(Conv(x.channels, self.pick(WIDTHS), bias=self.maybe()), at)
            at = self.put(self.norm(self.shapes[at].channels), at) if self.maybe() else at
        if kind == "padded":
            at = self.with_sides(at, target)
        if kind == "pool":
            pools = [Pool(k, s, p) for k, s, p in product((3, 2), (1, 2), (0, 1))]
            pools = [pool for pool in pools if (out := pool.shape(x)) and out.sizes == target.sizes]
            at = self.put(self.pick(pools), at) if pools else at
        return self.finish(at, target)

    def with_sides(self, at: int, target: Shape) -> int:
        """A separate padding after which a convolution leads to the target."""
        x = self.shapes[at]
        pads = [pad for pad in map(Pad, SIDES) if large_enough(out := pad.shape(x)) and strides_to(out, target)]
        return self.put(self.pick(pads), at) if pads else at

    def finish(self, at: int, target: Shape) -> int:
        """Append a convolution to the target, and sometimes a norm."""
        conv = self.conv(self.shapes[at], target)
        assert conv, (self.shapes[at], target)
        at = self.put(conv, at)
        return self.put(self.norm(target.channels), at) if self.maybe() else at

    # complete programs

    PATTERNS = (
        "conv_norm", "one", "branches", "residual", "branches", "block", "block", "chain", "cat", "join", "branches",
        "norm_conv", "again",
    )  # fmt: skip

    def write(self, patterns: int) -> None:
        for _ in range(patterns):
            getattr(self, self.pick(allowed(self.PATTERNS)))()

    def program(self, most: int, flat: bool = False) -> Program:
        """Return the program; it returns the values that no step reads, and sometimes one more."""
        read = {i for step in self.steps for i in step.reads}
        last = len(self.shapes) - 1
        ends = [i for i in range(last, -1, -1) if i not in read] or [last]
        ends += [self.pick(range(last, -1, -1))] if self.maybe() else []
        return Program(len(self.inputs), tuple(self.steps), tuple(dict.fromkeys(ends[:most])), flat)


def repeats(index: int, op: Op) -> list[Op]:
    """Return ops that use the module of a step again."""
    if isinstance(op, Conv):
        return [Again(index), Tied(index, op)]
    return (
        [Again(index)]
        if isinstance(op, (Norm, Scale, Chain)) or (isinstance(op, Block) and op.program.inputs == 1)
        else []
    )


@st.composite
def programs(draw) -> Program:
    """A network on an image of 3 channels."""
    builder = Builder(draw, (IMAGE,), depth=2)
    builder.write(draw(st.integers(1, 6)))
    return builder.program(most=4, flat=builder.maybe())
