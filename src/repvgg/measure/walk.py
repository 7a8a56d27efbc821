"""One walk over everything that a model executes; all counts are read off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg._contexts import eval_mode
from repvgg.errors import UsageError
from repvgg.measure.holding import Holding
from repvgg.measure.places import places_in
from repvgg.measure.rules import Work, is_known, name_of, work_of
from repvgg.measure.traffic import Traffic, made_by, tensors_in, traffic_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One executed op.

    Attributes:
        name: as in "aten.convolution", without the overload.
        inputs: shapes of the tensors among its arguments, in order.
        outputs: shapes of the tensors that it returned.
        work: its multiply-adds, or None where no rule knows the op.
        path: of the innermost module that executed it; "" for the model itself.
        traffic: the bytes that it moves, or None where they are not known.
        held: bytes of activations in memory while it runs: its outputs, and all that is needed later. Never unknown.
    """

    name: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    work: Work | None
    path: str = ""
    traffic: Traffic | None = None
    held: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds; 0 where they are not known."""
        return self.work.macs if self.work else 0

    @property
    def winograd_muls(self) -> int:
        """Multiplications with Winograd's F(2x2, 3x3) where it applies; 0 where they are not known."""
        return self.muls()

    def muls(self, tile: int = 2) -> int:
        """Multiplications with Winograd's F(tile x tile, 3x3) where it applies; 0 where they are not known."""
        return self.work.muls(tile) if self.work else 0


@dataclass(frozen=True)
class Walk:
    """All ops of one forward, in the order of execution."""

    ops: tuple[Op, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all ops that are known."""
        return sum(op.macs for op in self.ops)

    @property
    def winograd_muls(self) -> int:
        """Multiplications with Winograd's F(2x2, 3x3), of all ops that are known."""
        return sum(op.winograd_muls for op in self.ops)

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written, of all ops whose traffic is known."""
        return sum(op.traffic.moved for op in self.ops if op.traffic)

    @property
    def peak(self) -> int:
        """The activation peak in bytes: the most that is held while any op runs; inputs count, parameters do not."""
        return max((op.held for op in self.ops), default=0)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the ops that no rule knows, sorted: where there are any, the sums are lower bounds."""
        return tuple(sorted({op.name for op in self.ops if op.work is None}))

    @property
    def unknown_traffic(self) -> tuple[str, ...]:
        """Names of the ops whose traffic is not known, sorted: where there are any, its sum is a lower bound."""
        return tuple(sorted({op.name for op in self.ops if op.traffic is None}))


def walk(model: nn.Module, inputs: Tensor | Sequence[Tensor]) -> Walk:
    """Run ``model`` once, in eval mode and without gradients, and record every op that PyTorch executes.

    It runs where its tensors are; on meta tensors nothing is computed and no memory is used. The ``training`` flags
    are put back.

    Args:
        model: any module; it is not changed.
        inputs: its argument, or its arguments. Whoever calls a model keeps them, so they are held to the end.

    Raises:
        UsageError: there are no inputs, or one of them is not a tensor.

    Limits: only what goes through PyTorch's dispatcher is seen; a kernel called past it (ctypes, NumPy) is not, nor is
    the memory that a kernel takes for itself while it runs. Attention is one op on the CPU and on a GPU, and on the
    meta device the products that it is made of, which move more bytes.
    """
    arguments = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not arguments or not all(isinstance(argument, Tensor) for argument in arguments):
        raise UsageError("A walk needs the tensors that the model takes.")
    holding = Holding(model)
    holding.held(arguments)
    with eval_mode(model), torch.no_grad(), places_in(model) as place, _Recorder(place, holding) as recorder:
        model(*arguments)
    return Walk(tuple(recorder.ops))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each op below autograd. An op that PyTorch composes of others is recorded as these others."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and asking to skip the compiler would import all of it, which takes seconds."""
        return False

    def __init__(self, place: Callable[[], str], holding: Holding) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self._place, self._holding = place, holding

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_known(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        shapes = _shapes((args, kwargs)), _shapes(out)
        traffic, held = traffic_of(func, args, kwargs, out), self._holding.held(made_by(func, args, out))
        self.ops.append(Op(name_of(func), *shapes, work_of(func, args, out), self._place(), traffic, held))
        return out


def _shapes(value: Any) -> tuple[Shape, ...]:
    """Shapes of all tensors in nested tuples, lists and dicts."""
    return tuple(tuple(tensor.shape) for tensor in tensors_in(value))
