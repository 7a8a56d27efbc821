"""How many channels a ``forward`` expects, found by asking the first function that needs to know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from repvgg.algebra import ConvMap
from repvgg.errors import NotLinearError
from repvgg.symbolic import handlers, slicing
from repvgg.symbolic.tensor import HANDLERS, Source, SymbolicTensor, UnknownSize

_KEEP_CHANNELS = {handlers.pad, handlers.dropout, handlers.unchanged, handlers.avg_pool2d}
_MAY_BROADCAST = {
    HANDLERS[function] for function in (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg)
}


class ChannelsFound(Exception):  # noqa: N818 - an answer, not an error
    """The answer: the input has ``channels`` channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.channels = channels


class ChannelProbe(SymbolicTensor):
    """An input with an unknown number of channels; it raises :class:`ChannelsFound` at the first function that tells.

    Functions that keep the number of channels pass it on; all others raise NotLinearError.

    Attributes:
        certain: whether arithmetic raises as well. It takes images of one channel where it gives many, and of integers
            where it gives real numbers: what follows does not tell what the input is.
    """

    def __init__(self, certain: bool = False) -> None:
        super().__init__(Source(), ConvMap.identity(1, device="meta"))
        self.certain = certain

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
        handler = HANDLERS.get(func)
        if handler is handlers.conv2d:
            weight, groups = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 6, "groups")
            raise ChannelsFound(weight.shape[1] * (groups or 1))
        if handler is handlers.batch_norm:
            statistics = _argument(args, kwargs, 1, "running_mean")
            if statistics is not None:
                raise ChannelsFound(len(statistics))
        probe = next((argument for argument in args if isinstance(argument, ChannelProbe)), cls())
        keeps = handler in _KEEP_CHANNELS or (handler is slicing.getitem and slicing.keeps_channels(args[1]))
        if keeps or (handler in _MAY_BROADCAST and not probe.certain):
            return probe
        name = getattr(func, "__name__", func)
        if handler is None and probe.certain:
            raise NotLinearError(f"{name} is not a linear, shift-invariant map")
        raise NotLinearError(f"the number of input channels cannot be told in front of {name}")

    @property
    def shape(self) -> tuple[Any, ...]:
        """(N, C, H, W), all unknown."""
        return (UnknownSize(),) * 4


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def channels_of(forward: Callable[[Any], Any], *, certain: bool = False) -> int:
    """The number of input channels that ``forward`` expects; if ``certain``, it would take no others.

    Raises:
        NotLinearError: nothing on its way tells, or it fails before.
    """
    try:
        forward(ChannelProbe(certain))
    except ChannelsFound as found:
        return found.channels
    raise NotLinearError("the number of input channels cannot be told: there is no convolution and no batch norm")
