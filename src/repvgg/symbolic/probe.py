"""Infer the channels and layout that a ``forward`` expects, from the first function that determines them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from repvgg.algebra import ConvMap
from repvgg.errors import NotLinearError, ReparamError
from repvgg.symbolic import handlers, reshaping, slicing
from repvgg.symbolic.layout import (
    IMAGES,
    ROWS,
    SEQUENCES,
    VECTORS,
    VOLUMES,
    Arrangement,
    Layout,
    UnknownShape,
    UnknownSize,
)
from repvgg.symbolic.tensor import HANDLERS, Source, SymbolicTensor

_POOLS = {handlers.avg_pool1d: SEQUENCES, handlers.avg_pool2d: IMAGES, handlers.avg_pool3d: VOLUMES}
_KEEP_ALL = {handlers.dropout, reshaping.contiguous, reshaping.clone}
_REARRANGE = {
    *(reshaping.permute, reshaping.transpose, reshaping.movedim, reshaping.flatten, reshaping.squeeze),
    *(reshaping.unsqueeze, reshaping.mean),
    *(reshaping.adaptive_avg_pool1d, reshaping.adaptive_avg_pool2d, reshaping.adaptive_avg_pool3d),
}
_MAY_BROADCAST = {
    HANDLERS[function] for function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg)
}
_GUESSES = (IMAGES, SEQUENCES, VOLUMES, VECTORS)


class InputSpec(NamedTuple):
    """Number of channels and layout of an input."""

    channels: int
    layout: Layout


class ChannelsFound(Exception):  # noqa: N818 - an answer, not an error
    """Raised with the answer: the ``spec`` of the input."""

    def __init__(self, channels: int, layout: Layout) -> None:
        super().__init__(channels, layout)
        self.spec = InputSpec(channels, layout)


class ChannelProbe(SymbolicTensor):
    """An input of which nothing is known; it raises :class:`ChannelsFound` at the first function that determines it.

    Functions that keep the number of channels return a probe; all others raise NotLinearError. Code that reads the
    number of axes, or slices some of them, gets a guess, and is run again for every other guess.

    Attributes:
        known: whether the layout was given, or determined by a function.
        guessed: whether the forward relied on a layout that was not known.
        refuted: whether a function contradicts the guess.
        channels: the number of channels that a batch norm has.
        input: the probe of the input, which this one is, or was rearranged from.
    """

    def __init__(self, layout: Layout = IMAGES, *, known: bool = False) -> None:
        super().__init__(Source(), ConvMap.identity(1, device="meta", spatial=layout.spatial), layout)
        self.known = known
        self.guessed = self.refuted = False
        self.channels: int | None = None
        self.input = self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for any of its functions with a probe among the arguments."""
        kwargs = kwargs or {}
        found = [value for value in (*args, *kwargs.values()) if isinstance(value, ChannelProbe)]
        # torch calls this class method also if the probe is nested in a list, as in torch.cat([x, y]).
        probe = found[0] if found else cls()
        handler = HANDLERS.get(func)
        if handler in (handlers.convolution, handlers.linear):
            probe.infer_from_kernel(_argument(args, kwargs, 1, "weight"), handler, _argument(args, kwargs, 6, "groups"))
        if handler is handlers.batch_norm and (statistics := _argument(args, kwargs, 1, "running_mean")) is not None:
            return probe.infer_from_batch_norm(len(statistics))
        if handler in _POOLS:
            return probe.set_layout(_POOLS[handler])
        if handler in _KEEP_ALL or probe.keeps_channels(handler, args, kwargs):
            return probe
        if handler in _REARRANGE:
            return probe.rearranged(handler, args, kwargs)
        # Assume no broadcasting; a wrong number of channels fails at the convolution, with an error.
        if handler in _MAY_BROADCAST:
            return probe
        raise NotLinearError(f"the number of input channels is not known before {getattr(func, '__name__', func)}")

    def infer_from_kernel(self, weight: Any, handler: Callable[..., Any], groups: int | None) -> None:
        """Take channels and layout from the kernel of a convolution or a linear layer."""
        self.set_layout(ROWS if handler is handlers.linear else Layout(weight.dim()))
        raise ChannelsFound(weight.shape[1] * (groups or 1), self.input.layout)

    def infer_from_batch_norm(self, channels: int) -> ChannelProbe:
        """Take the number of channels from a batch norm, which accepts any layout with channels at axis 1."""
        if (self.known or self.guessed) and not self.layout.is_channel_axis(1):
            raise NotLinearError(f"a batch norm does not take the last axis of {self.layout} as its channels")
        self.input.channels = channels
        if self.known or (self.guessed and self.input.layout == IMAGES):
            raise ChannelsFound(channels, self.input.layout)
        return self  # a later function may determine the layout

    def set_layout(self, found: Layout) -> ChannelProbe:
        """Take the layout from a function that accepts only one."""
        is_definite = self.known or self is not self.input
        if found != self.layout and not (is_definite and found == ROWS and self.layout.rows):
            if self.known or self.guessed:
                self.input.refuted = True
                raise NotLinearError(f"a function of tensors {found} is applied to one {self.layout}")
            self.arrangement = Arrangement.of(found)
        self.known = True
        return self

    def keeps_channels(self, handler: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a slice or a padding keeps all channels, which depends on the layout."""
        if handler is slicing.getitem:
            self.guess_layout()
            return slicing.keeps_channels(args[1], self)
        if handler is slicing.pad:
            return not any(_argument(args, kwargs, 1, "pad")[2 * self.guess_layout().spatial :])
        return False

    def rearranged(self, handler: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ChannelProbe:
        """Return a probe of the same input with other axes."""
        self.guess_layout()
        probe: ChannelProbe = copy.copy(self)
        probe.arrangement = handler(*args, **kwargs).arrangement
        return probe

    def guess_layout(self) -> Layout:
        """Return the layout, known or guessed, to code that relies on it."""
        # From here on the run is only valid for this layout.
        self.guessed = self.guessed or not self.known
        return self.layout

    @property
    def shape(self) -> Any:
        """A shape of unknown sizes, for the guessed number of axes."""
        rank = self.guess_layout().rank
        return UnknownShape(UnknownSize()) if rank is None else (UnknownSize(),) * rank

    @property
    def ndim(self) -> Any:
        """The number of axes, as guessed."""
        self.guess_layout()
        return super().ndim


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


class _PromotedDtypes(TorchFunctionMode):
    """Inside, a function that refuses tensors of several floating-point dtypes gets all of them in the widest one.

    Constants that a forward makes have the default dtype, and meet weights in float64.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            floats = {value.dtype for value in tensors if value.is_floating_point()}
            if len(floats) < 2:
                raise
            widest = reduce(torch.promote_types, floats)

            def widen(value: Any) -> Any:
                return value.to(widest) if isinstance(value, Tensor) and value.dtype in floats else value

            args, kwargs = tree_map(widen, (args, dict(kwargs)))
            return func(*args, **kwargs)


def guarded(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``forward``; any error that user code raises on a symbolic input means that it is not linear."""
    try:
        with _PromotedDtypes():
            return forward(*args, **kwargs)
    except (ReparamError, ChannelsFound):
        raise
    except Exception as error:
        raise NotLinearError(f"its code cannot run on a symbolic input ({type(error).__name__}: {error})") from error


def channels_of(
    forward: Callable[[Any], Any], *, channels: int | None = None, layout: Layout | None = None
) -> InputSpec:
    """Return channels and layout of the input that ``forward`` expects.

    Args:
        forward: called with a probe, more than once where it depends on the number of axes.
        channels: if they are known; if then nothing determines the layout, it is that of images.
        layout: if it is known.

    Raises:
        NotLinearError: no function determines them, or one fails before.
    """
    answers: list[InputSpec] = []
    errors: list[ReparamError] = []
    normalizes = False
    # One run is enough unless the forward branches on the rank; images come first, as by far the most common.
    for guess in (layout,) if layout else _GUESSES:
        probe = ChannelProbe(guess, known=layout is not None)
        answer = _ask(forward, probe, channels, errors)
        # A forward for several ranks is taken to be for images.
        if answer and (guess == IMAGES or not probe.guessed):
            return answer
        answers += [answer] if answer else []
        normalizes = normalizes or probe.channels is not None
        if not probe.guessed:
            break
    # Every other guess was refuted.
    if len(answers) == 1:
        return answers[0]
    if answers or (normalizes and channels is None):
        raise NotLinearError("the shape of the input is not known, and a batch norm alone does not determine it")
    if channels is not None:
        return InputSpec(channels, layout or IMAGES)
    text = "the number of input channels is not known: there is no convolution and no batch norm"
    raise errors[0] if errors else NotLinearError(text)


def _ask(
    forward: Callable[[Any], Any], probe: ChannelProbe, channels: int | None, errors: list[ReparamError]
) -> InputSpec | None:
    """Return what ``forward`` determines about a probe, or None; errors are appended to ``errors``."""
    try:
        guarded(forward, probe)
    except ChannelsFound as found:
        return found.spec if channels is None else found.spec._replace(channels=channels)
    except ReparamError as error:
        errors.append(error)
    count = channels if channels is not None and probe.known else probe.channels
    has_layout = (probe.known or probe.guessed) and not probe.refuted
    return InputSpec(count, probe.layout) if count is not None and has_layout else None
