"""The symbolic tensor: it passes through a ``forward`` in place of a real one and records what is computed."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from repvgg.algebra import ConvMap, compose, over_axes
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic.border import PaddedBorder
from repvgg.symbolic.layout import (
    IMAGES,
    RANK_UNKNOWN,
    Arrangement,
    Layout,
    Part,
    Position,
    UnknownShape,
    UnknownSize,
)

Handler = TypeVar("Handler", bound=Callable[..., Any])
HANDLERS: dict[Any, Callable[..., Any]] = {}  # by torch function; a function without an entry is not linear


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler in ``HANDLERS`` for each of the torch ``functions``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


class Source:
    """The real tensor that symbolic tensors are functions of, with a ledger of the operations applied to it.

    Attributes:
        merge_branches: whether sums and concatenations of several functions of this source may become one map.
        operations: names of the operations so far; a convolution is called ``conv``.
        sizes: spatial sizes of the source, if costs are those at these sizes.
        shape: its whole shape, if it is known: then a reshape to given numbers can be followed.
        multiply_adds: their total cost per pixel of the source; borders are ignored unless the sizes are known.
        weights: total size of their kernels.
        layout: that of the real tensor, once a symbol represents it.
        dtype: in which constants were computed before they were converted.
    """

    def __init__(self, merge_branches: bool = True, dtype: torch.dtype = torch.float64) -> None:
        self.merge_branches = merge_branches
        self.dtype = dtype
        self.operations: list[str] = []
        self.sizes: tuple[int, ...] | None = None
        self.shape: tuple[int, ...] | None = None
        self.multiply_adds = 0.0
        self.weights = 0
        self.layout = IMAGES

    def record(self, operation: str, result: ConvMap, kernel: ConvMap | None = None, averaged: bool = False) -> None:
        """Record one operation with its ``result``, a map of the source; for a convolution also its kernel.

        After a mean over the pixels (``averaged``), one output is computed and not one for each pixel.
        """
        self.operations.append(operation)
        # Batch norms, sums and identities count as free.
        if kernel is not None:
            self.multiply_adds += kernel.kernel.numel() * self.outputs_per_input(result, averaged)
            self.weights += kernel.kernel.numel()

    def outputs_per_input(self, conv: ConvMap, averaged: bool) -> float:
        """Return output pixels of ``conv`` per pixel of the source; after a mean over all pixels, next to none."""
        return 1 / math.prod(self.sizes or (math.inf,)) if averaged else conv.outputs_per_input(self.sizes)


class _Memory:
    """What symbolic tensors have in common that may be views of each other.

    Attributes:
        writes: how often one of them was modified in place.
        is_source: whether the source is one of them, which must not be modified.
    """

    def __init__(self, is_source: bool = False) -> None:
        self.writes = 0
        self.is_source = is_source


class SymbolicTensor:
    """A tensor that is known only as ``map(source)``, an affine function of one real tensor.

    Torch functions called on it are dispatched to their handlers, which act on the map. A function without a handler
    is not linear and raises NotLinearError. In-place functions update this object, so that aliases see the result as
    they would with a real tensor; views of it, which would change too, are not readable from then on.

    Attributes:
        source: the real tensor.
        map: the function, over as many spatial axes as the source has. If axes were averaged, the tensor is the mean
            of its output, and all that follows is pointwise, so that it may be computed before or after the mean.
        arrangement: the axes of the tensor.
        border: that of a tensor that was just padded, else None; until it is right, the tensor is not readable.
        is_source: whether it is the source itself.
    """

    def __init__(
        self,
        source: Source,
        conv: ConvMap,
        axes: Layout | Arrangement = IMAGES,
        *,
        view_of: SymbolicTensor | None = None,
    ) -> None:
        self.source = source
        self.map = conv
        self.arrangement = axes if isinstance(axes, Arrangement) else Arrangement.of(axes)
        self.border: PaddedBorder | None = None
        self.is_source = False
        self._memory: _Memory = _Memory() if view_of is None else view_of._memory
        self._writes = self._memory.writes

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
        symbol._memory.is_source = True
        source.layout = layout
        return symbol

    def copy(self) -> SymbolicTensor:
        """Return a copy, so that an in-place function on one leaves the other unchanged."""
        symbol = SymbolicTensor(self.source, self.map, self.arrangement)
        symbol.is_source = self.is_source
        symbol._memory.is_source = self.is_source
        symbol.border = self.border and self.border.copy()
        return symbol

    def write(self, conv: ConvMap, border: PaddedBorder | None = None) -> None:
        """Modify the tensor in place to ``conv``; raise NotLinearError if the source would change with it."""
        if self._memory.is_source:
            raise NotLinearError("the input, or a view of it, is modified in place")
        self._memory.writes += 1
        self.map, self.border, self._writes = conv, border, self._memory.writes

    def why_overwritten(self) -> NotLinearError | None:
        """Return the error that the values are no longer ``map(source)``, or None."""
        if self._writes == self._memory.writes:
            return None
        return NotLinearError("it is read after another view of its memory was modified in place")

    def why_unreadable(self) -> ReparamError | None:
        """Return the error that the next function which reads the tensor raises, or None."""
        if self.border is None or self.why_overwritten() is not None:
            return self.why_overwritten()
        return self.border.error()

    @property
    def layout(self) -> Layout:
        """The layout of the tensor, which says where the channels are."""
        return self.arrangement.layout

    @property
    def has_axes_of_source(self) -> bool:
        """Whether its axes are those of the source: neither permuted, nor merged, split or averaged over."""
        return self.arrangement == Arrangement.of(self.source.layout)

    @property
    def is_convolution(self) -> bool:
        """Whether one convolution of the source, in its layout, returns the tensor."""
        return self.has_axes_of_source and self.why_unreadable() is None

    def like(
        self,
        conv: ConvMap,
        operation: str,
        kernel: ConvMap | None = None,
        *,
        arrangement: Arrangement | None = None,
        view: bool = False,
    ) -> SymbolicTensor:
        """Return another function of the same source after one more ``operation``; a convolution has a ``kernel``."""
        self.source.record(operation, conv, kernel, bool(self.arrangement.averaged))
        return SymbolicTensor(self.source, conv, arrangement or self.arrangement, view_of=self if view else None)

    def then(self, outer: ConvMap, operation: str) -> SymbolicTensor:
        """Return ``outer`` applied to the tensor, over its axes as they are now.

        Raises:
            NotLinearError: the axes are not those of the source, and ``outer`` is not pointwise.
            BorderError: see :func:`repvgg.algebra.compose`.
        """
        if not outer.is_pointwise and not self.has_axes_of_source:
            raise NotLinearError(f"its axes were rearranged, and over them a {operation} is not one of its input")
        outer = over_axes(outer, self.map.spatial)
        return self.like(compose(self.map, outer), operation, outer)

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

    def size_of(self, position: Position) -> UnknownSize:
        """Return the size of an axis of the arrangement, as the map leaves it."""
        shape, key, value = self.source.shape, (self.source, position), None
        if isinstance(position, Part):
            return UnknownSize(factors=(key,), value=position.sizes[position.index])
        if position and self.map.spatial:
            axis = self.map.axes[position - 1]
            value = None if shape is None else axis.output_size(shape[position + 1])
            return UnknownSize(factors=((*key, axis.stride, axis.growth),), value=value)
        return UnknownSize(factors=(key,), value=None if shape is None else shape[position])

    @property
    def shape(self) -> Any:
        """The shape, such as (N, C, H, W); only C is a known number."""
        axes, channels = self.arrangement.axes, self.map.out_channels
        if axes is None:
            return UnknownShape(channels)
        return tuple(channels if isinstance(axis, str) else math.prod(map(self.size_of, axis)) for axis in axes)

    @property
    def ndim(self) -> Any:
        """The number of axes; if it is not known, an object that raises when it is used."""
        axes = self.arrangement.axes
        return UnknownSize(RANK_UNKNOWN) if axes is None else len(axes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the algebra runs in."""
        return self.map.dtype

    @property
    def device(self) -> torch.device:
        """The device that the algebra runs on."""
        return self.map.device

    @property
    def mT(self) -> Any:  # noqa: N802 - torch's own name
        """The tensor with its last two axes swapped."""
        return self.__torch_function__(Tensor.transpose, (), (self, -2, -1))

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

    def __pos__(self) -> Any:
        return self.__torch_function__(operator.pos, (), (self,))

    def __neg__(self) -> Any:
        return self.__torch_function__(operator.neg, (), (self,))

    def __getitem__(self, index: Any) -> Any:
        return self.__torch_function__(operator.getitem, (), (self, index))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.__torch_function__(operator.setitem, (), (self, index, value))

    def __bool__(self) -> NoReturn:
        raise NotLinearError("control flow depends on the values of the image")

    def __repr__(self) -> str:
        return f"SymbolicTensor({self.map})"


def assign_item(target: Any, index: Any, value: Any) -> Any:
    """Run ``target[index] = value`` and return ``target``, as a graph needs a name for the tensor that it becomes."""
    target[index] = value
    return target


ITEM_ASSIGNMENTS = (operator.setitem, Tensor.__setitem__, assign_item)


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the handler of ``func``; raise NotLinearError if there is none, so that it is not known to be linear."""
    handler = HANDLERS.get(func)
    if handler is None:
        raise NotLinearError(f"{getattr(func, '__name__', func)} is not a linear, shift-invariant map")
    for value in (*args[func in ITEM_ASSIGNMENTS :], *kwargs.values()):  # an assignment does not read its target
        for symbol in value if isinstance(value, (list, tuple)) else (value,):
            error = symbol.why_unreadable() if isinstance(symbol, SymbolicTensor) else None
            if error is not None:
                raise error
    return handler(*args, **kwargs)


def _binary(function: Callable[..., Any]) -> Callable[[SymbolicTensor, Any], Any]:
    return lambda self, other: self.__torch_function__(function, (), (self, other))


def _reflected(function: Callable[..., Any]) -> Callable[[SymbolicTensor, Any], Any]:
    return lambda self, other: self.__torch_function__(function, (), (other, self))


# In-place operators map to operator.iadd etc., whose handlers update the symbol, as torch updates the tensor.
for _name in ("add", "sub", "mul", "truediv", "matmul"):
    setattr(SymbolicTensor, f"__{_name}__", _binary(getattr(operator, _name)))
    setattr(SymbolicTensor, f"__r{_name}__", _reflected(getattr(operator, _name)))
    setattr(SymbolicTensor, f"__i{_name}__", _binary(getattr(operator, f"i{_name}")))
