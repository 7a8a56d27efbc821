"""The symbolic tensor: it passes through a ``forward`` in place of a real one and records what is computed.

Letters: N images, C channels, L length, D, H and W depth, height and width; ``...`` any number of axes.
"""

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
    """Which axes a tensor has: (N, C, *X) with the channels at axis 1, or *rows* (..., C) with the channels last.

    (N, C) is both at once: ``Layout(2) == Layout(2, rows=True)``.

    Attributes:
        rank: the number of axes; None, which only rows allow, if it is not known.
        rows: whether the channels are the last axis.

    Raises:
        UsageError: there is no such shape.
    """

    rank: int | None
    rows: bool = False

    def __post_init__(self) -> None:
        # Equal layouts must compare as equal, and (N, C) can be described in both ways.
        if self.rank == 2:
            object.__setattr__(self, "rows", True)
        if (self.rank is None or not 3 <= self.rank <= 5) and not self.rows:
            raise UsageError(f"A tensor with channels at axis 1 must have 2 to 5 axes, got {self.rank}.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"Rows must have at least 1 axis, got {self.rank}.")

    @property
    def spatial(self) -> int:
        """The number of spatial axes, along which a convolution slides; 0 for rows."""
        return 0 if self.rows or self.rank is None else self.rank - 2

    @property
    def axis(self) -> int:
        """The axis of the channels, counted from the end."""
        return -1 - self.spatial

    def is_channel_axis(self, dim: int) -> bool:
        """Whether ``dim``, counted from the start or from the end, is the axis of the channels."""
        return dim == self.axis or (self.rank is not None and dim == self.axis + self.rank)

    def __str__(self) -> str:
        """Return the shape, such as (N, C, H, W)."""
        if self.rows and self.rank not in (None, 2):
            return f"({'·, ' * ((self.rank or 1) - 1)}C)"
        return "(..., C)" if self.rank is None else _SHAPES[self.rank]


IMAGES = Layout(4)
SEQUENCES = Layout(3)
VOLUMES = Layout(5)
VECTORS = Layout(2)
ROWS = Layout(None, rows=True)


Handler = TypeVar("Handler", bound=Callable[..., Any])
HANDLERS: dict[Any, Callable[..., Any]] = {}  # by torch function; a function without an entry is not linear


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler in ``HANDLERS`` for each of the torch ``functions``."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


class UnknownSize:
    """The height, width or batch size of a symbolic input. A convolution does not depend on it, so every use raises."""

    def __init__(self, reason: str = "the result depends on the size of the image") -> None:
        self._reason = reason

    def _refuse(self, *_: object) -> NoReturn:
        raise NotLinearError(self._reason)

    # Passing a size on is fine; every operator that would use its value raises.
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __floordiv__ = __truediv__ = __mod__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __index__ = __neg__ = _refuse
    __hash__ = object.__hash__  # defining __eq__ removes it


RANK_UNKNOWN = (
    "the shape of the input is not known: a linear layer takes any number of axes, and what follows depends on it"
)


class UnknownShape(UnknownSize):
    """The shape (..., C), of which only the last size is known."""

    def __init__(self, channels: Any) -> None:
        super().__init__(RANK_UNKNOWN)
        self.channels = channels

    def __getitem__(self, index: Any) -> Any:
        return self.channels if index == -1 else UnknownSize(RANK_UNKNOWN)

    __len__ = __iter__ = UnknownSize._refuse


class Source:
    """The real tensor that symbolic tensors are functions of, with a ledger of the operations applied to it.

    Attributes:
        merge_branches: whether sums and concatenations of several functions of this source may become one map.
        operations: names of the operations so far; a convolution is called ``conv``.
        sizes: spatial sizes of the source, if they are known.
        multiply_adds: their total cost per pixel of the source; borders are ignored unless the sizes are known.
        weights: total size of their kernels.
        layout: that of the real tensor, once a symbol represents it.
    """

    def __init__(self, merge_branches: bool = True) -> None:
        self.merge_branches = merge_branches
        self.operations: list[str] = []
        self.sizes: tuple[int, ...] | None = None
        self.multiply_adds = 0.0
        self.weights = 0
        self.layout = IMAGES

    def record(self, operation: str, result: ConvMap, kernel: ConvMap | None = None) -> None:
        """Record one operation with its ``result``, a map of the source; for a convolution also its kernel."""
        self.operations.append(operation)
        # Batch norms, sums and identities count as free.
        if kernel is not None:
            self.multiply_adds += kernel.kernel.numel() * result.outputs_per_input(self.sizes)
            self.weights += kernel.kernel.numel()

    def add(self, operations: Iterable[str], multiply_adds: float, weights: int) -> None:
        """Record operations that were computed earlier on another source, with their total cost."""
        self.operations += operations
        self.multiply_adds += multiply_adds
        self.weights += weights


class SymbolicTensor:
    """A tensor that is known only as ``map(source)``, an affine function of one real tensor.

    Torch functions called on it are dispatched to their handlers, which act on the map. A function without a handler
    is not linear and raises NotLinearError. In-place functions update this object, so that aliases see the result as
    they would with a real tensor; if they would modify a view or the source itself, they raise.

    Attributes:
        source: the real tensor.
        map: the function.
        layout: the axes of the tensor, which say where the channels are.
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
        """Return the source itself, with ``channels`` channels; the algebra runs in ``dtype`` on ``device``."""
        symbol = cls(source, ConvMap.identity(channels, dtype, device, layout.spatial), layout)
        symbol.is_source = True
        source.layout = layout
        return symbol

    def copy(self) -> SymbolicTensor:
        """Return a copy, so that an in-place function on one leaves the other unchanged."""
        # The copy is no view: an in-place function may change it without affecting anything else.
        symbol = SymbolicTensor(self.source, self.map, self.layout)
        symbol.is_source = self.is_source
        return symbol

    @property
    def is_flattened(self) -> bool:
        """Whether the tensor has another number of axes than the source; no convolution returns such a tensor."""
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
        """Return another function of the same source after one more ``operation``; a convolution has a ``kernel``."""
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
        """The shape by the layout, such as (N, C, H, W); only C is a known number."""
        rank = self.layout.rank
        if rank is None:
            return UnknownShape(self.map.out_channels)
        place = rank + self.layout.axis
        return tuple(self.map.out_channels if axis == place else UnknownSize() for axis in range(rank))

    @property
    def ndim(self) -> Any:
        """The number of axes; if it is not known, an object that raises when it is used."""
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
        """Return the number of axes; see :attr:`ndim`."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one entry of it."""
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        # Methods without a definition here, such as x.flatten, go through the same table as functions.
        method = getattr(torch.Tensor, name, None)
        # Dunder lookups come from Python itself (copy, pickle), which must see an ordinary object.
        if name.startswith("__") or not callable(method):
            raise AttributeError(f"a symbolic tensor has no attribute {name!r}")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __neg__(self) -> Any:
        return self.__torch_function__(operator.neg, (), (self,))

    def __getitem__(self, index: Any) -> Any:
        return self.__torch_function__(operator.getitem, (), (self, index))

    def __bool__(self) -> NoReturn:
        raise NotLinearError("control flow depends on the values of the image")

    def __repr__(self) -> str:
        return f"SymbolicTensor({self.map})"


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the handler of ``func``; raise NotLinearError if there is none, so that it is not known to be linear."""
    handler = HANDLERS.get(func)
    if handler is None:
        raise NotLinearError(f"{getattr(func, '__name__', func)} is not a linear, shift-invariant map")
    return handler(*args, **kwargs)


def _binary(function: Callable[..., Any]) -> Callable[[SymbolicTensor, Any], Any]:
    return lambda self, other: self.__torch_function__(function, (), (self, other))


def _reflected(function: Callable[..., Any]) -> Callable[[SymbolicTensor, Any], Any]:
    return lambda self, other: self.__torch_function__(function, (), (other, self))


# In-place operators map to operator.iadd etc., whose handlers update the symbol, as torch updates the tensor.
for _name in ("add", "sub", "mul", "truediv"):
    setattr(SymbolicTensor, f"__{_name}__", _binary(getattr(operator, _name)))
    setattr(SymbolicTensor, f"__r{_name}__", _reflected(getattr(operator, _name)))
    setattr(SymbolicTensor, f"__i{_name}__", _binary(getattr(operator, f"i{_name}")))
