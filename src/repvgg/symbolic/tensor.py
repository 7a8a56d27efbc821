"""The symbolic input: an object that goes through a ``forward`` in place of a tensor and comes out as a formula."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

from repvgg.algebra import ConvMap
from repvgg.errors import NotLinearError, UsageError

_SHAPES = {2: "(N, C)", 3: "(N, C, L)", 4: "(N, C, H, W)", 5: "(N, C, D, H, W)"}


@dataclass(frozen=True)
class Layout:
    """The shape (N, C, *X) with the channels at axis 1, or (..., C), rows, with the channels last.

    (N, C) is both at once: ``Layout(2) == Layout(2, rows=True)``.

    Attributes:
        rank: the number of axes; None where it is not known, which only rows allow.
        rows: whether the channels are the last axis.

    Raises:
        UsageError: there is no such shape.
    """

    rank: int | None
    rows: bool = False

    def __post_init__(self) -> None:
        if self.rank == 2:
            object.__setattr__(self, "rows", True)
        if (self.rank is None or not 3 <= self.rank <= 5) and not self.rows:
            raise UsageError(f"A tensor with channels at axis 1 has 2 to 5 axes, not {self.rank}.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"Rows have at least 1 axis, not {self.rank}.")

    @property
    def spatial(self) -> int:
        """How many axes a convolution of such a tensor reaches along; 0 for rows."""
        return 0 if self.rows or self.rank is None else self.rank - 2

    @property
    def axis(self) -> int:
        """The axis of the channels, counted from the end."""
        return -1 - self.spatial

    def is_channel_axis(self, dim: int) -> bool:
        """Whether ``dim``, from the front or from the end, is the axis of the channels."""
        return dim == self.axis or (self.rank is not None and dim == self.axis + self.rank)

    def __str__(self) -> str:
        """Such as (N, C, H, W)."""
        if self.rows and self.rank not in (None, 2):
            return f"({'·, ' * ((self.rank or 1) - 1)}C)"
        return "(..., C)" if self.rank is None else _SHAPES[self.rank]


IMAGES = Layout(4)
SEQUENCES = Layout(3)
VOLUMES = Layout(5)
VECTORS = Layout(2)
ROWS = Layout(None, rows=True)


Handler = TypeVar("Handler", bound=Callable[..., Any])
HANDLERS: dict[Any, Callable[..., Any]] = {}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Enter a handler in the table under each of the torch ``functions`` that it speaks for."""

    def enter(handler: Handler) -> Handler:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return enter


class UnknownSize:
    """The height, width or batch size of a symbolic input: nothing linear depends on it, so nothing may ask."""

    def __init__(self, reason: str = "the outcome depends on the size of the image") -> None:
        self._reason = reason

    def _refuse(self, *_: object) -> NoReturn:
        raise NotLinearError(self._reason)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __truediv__ = __mod__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __index__ = __neg__ = _refuse
    __hash__ = object.__hash__


RANK_UNKNOWN = (
    "the shape of the input is not known: a linear layer takes any number of axes, and what follows depends on how many"
)


class UnknownShape:
    """The shape (..., C) of which only the last size is known."""

    def __init__(self, channels: Any) -> None:
        self.channels = channels

    def __getitem__(self, index: Any) -> Any:
        return self.channels if index == -1 else UnknownSize(RANK_UNKNOWN)

    def _refuse(self, *_: object) -> NoReturn:
        raise NotLinearError(RANK_UNKNOWN)

    __len__ = __iter__ = __eq__ = __ne__ = __add__ = __radd__ = _refuse
    __hash__ = object.__hash__


class Source:
    """The real tensor that symbolic tensors are functions of, and a ledger of what was done to it on the way.

    Attributes:
        merge_branches: whether sums and concatenations of several functions of this source may become one map.
        operations: the names of the operations so far; a convolution is called ``conv``.
        sizes: height and width, or their like, of the source, where they are known.
        multiply_adds: what they cost in all, per pixel of the source; borders aside, unless the sizes are known.
        weights: how many numbers their kernels hold.
        layout: that of the real tensor, once a symbol stands for it.
    """

    def __init__(self, merge_branches: bool = True) -> None:
        self.merge_branches = merge_branches
        self.operations: list[str] = []
        self.sizes: tuple[int, ...] | None = None
        self.multiply_adds = 0.0
        self.weights = 0
        self.layout = IMAGES

    def record(self, operation: str, outcome: ConvMap, kernel: ConvMap | None = None) -> None:
        """Enter one operation, and the ``outcome`` as a map of the source; a convolution with its kernel."""
        self.operations.append(operation)
        if kernel is not None:
            self.multiply_adds += kernel.kernel.numel() * outcome.outputs_per_input(self.sizes)
            self.weights += kernel.kernel.numel()

    def add(self, operations: Iterable[str], multiply_adds: float, weights: int) -> None:
        """Enter operations that were done before, on another source, with all that they cost."""
        self.operations += operations
        self.multiply_adds += multiply_adds
        self.weights += weights


class SymbolicTensor:
    """A tensor of which only this is known: it is ``map(source)``, an algebraic function of one real tensor.

    Torch functions called on it look themselves up in the table of handlers and act on the map. A function without a
    handler ends the linear region: it raises NotLinearError. In-place functions change this object, as they would
    change a tensor, so that aliases see it; where a view or the source itself would be changed, they raise.

    Attributes:
        source: the real tensor.
        map: the function.
        layout: the shape of the tensor, which tells where ``map`` finds and leaves the channels.
        is_view: whether it may share memory with another tensor.
        is_source: whether it is the source itself.
    """

    def __init__(self, source: Source, conv: ConvMap, layout: Layout = IMAGES, *, is_view: bool = False) -> None:
        self.source = source
        self.map = conv
        self.layout = layout
        self.is_view = is_view
        self.is_source = False

    @classmethod
    def of(
        cls,
        source: Source,
        channels: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        layout: Layout = IMAGES,
    ) -> SymbolicTensor:
        """The source itself, with ``channels`` channels; the algebra runs in ``dtype`` on ``device``."""
        symbol = cls(source, ConvMap.identity(channels, dtype, device, layout.spatial), layout)
        symbol.is_source = True
        source.layout = layout
        return symbol

    def copy(self) -> SymbolicTensor:
        """The same function as an object of its own: changing one in place leaves the other."""
        symbol = SymbolicTensor(self.source, self.map, self.layout)
        symbol.is_source = self.is_source
        return symbol

    @property
    def is_flattened(self) -> bool:
        """Whether the tensor has another number of axes than the source: no module has it for an outcome."""
        return self.layout != self.source.layout

    def like(
        self,
        conv: ConvMap,
        operation: str,
        kernel: ConvMap | None = None,
        *,
        is_view: bool = False,
        layout: Layout | None = None,
    ) -> SymbolicTensor:
        """Another function of the same source, after one more ``operation``, a convolution with its ``kernel``."""
        self.source.record(operation, conv, kernel)
        return SymbolicTensor(self.source, conv, layout or self.layout, is_view=is_view)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for any of its functions with a symbolic argument."""
        return dispatch(func, args, kwargs or {})

    @property
    def shape(self) -> Any:
        """As the layout says, such as (N, C, H, W); only C is known."""
        rank = self.layout.rank
        if rank is None:
            return UnknownShape(self.map.out_channels)
        place = rank + self.layout.axis
        return tuple(self.map.out_channels if axis == place else UnknownSize() for axis in range(rank))

    @property
    def ndim(self) -> Any:
        """The number of axes; where it is not known, something that refuses to be compared."""
        return UnknownSize(RANK_UNKNOWN) if self.layout.rank is None else self.layout.rank

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the algebra runs in."""
        return self.map.dtype

    @property
    def device(self) -> torch.device:
        """The device that the algebra runs on."""
        return self.map.device

    def dim(self) -> Any:
        """The number of axes; see :attr:`ndim`."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or not callable(method):
            raise AttributeError(f"a symbolic tensor has no attribute {name!r}")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __neg__(self) -> Any:
        return self.__torch_function__(operator.neg, (), (self,))

    def __getitem__(self, index: Any) -> Any:
        return self.__torch_function__(operator.getitem, (), (self, index))

    def __bool__(self) -> NoReturn:
        raise NotLinearError("a decision depends on the values of the image")

    def __repr__(self) -> str:
        return f"SymbolicTensor({self.map})"


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Let the handler of ``func`` act on the arguments.

    Raises:
        NotLinearError: there is no handler: the function is not known to be linear.
    """
    handler = HANDLERS.get(func)
    if handler is None:
        raise NotLinearError(f"{getattr(func, '__name__', func)} is not a linear, shift-invariant map")
    return handler(*args, **kwargs)


def _binary(function: Callable[..., Any]) -> Callable[[SymbolicTensor, Any], Any]:
    return lambda self, other: self.__torch_function__(function, (), (self, other))


def _reflected(function: Callable[..., Any]) -> Callable[[SymbolicTensor, Any], Any]:
    return lambda self, other: self.__torch_function__(function, (), (other, self))


for _name in ("add", "sub", "mul", "truediv"):
    setattr(SymbolicTensor, f"__{_name}__", _binary(getattr(operator, _name)))
    setattr(SymbolicTensor, f"__r{_name}__", _reflected(getattr(operator, _name)))
    setattr(SymbolicTensor, f"__i{_name}__", _binary(getattr(operator, f"i{_name}")))
