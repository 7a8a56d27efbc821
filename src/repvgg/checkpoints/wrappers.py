"""The dictionaries and prefixes that training scripts wrap around a state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from repvgg.checkpoints.numpy_pickle import PickledArray

# In this order: averaged weights come first.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema_model", "ema")
_CURRENT = (
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net", "params", "weights"),
    "module",  # inside an average
)
# Of DataParallel, torch.compile and Lightning modules, and names that wrapping modules give the network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
_MAX_NESTING = 8
_MAX_CANDIDATES = 16  # prefixes to try
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, eq=False)
class Unwrapped:
    """The tensors in nested dictionaries.

    Attributes:
        tensors: by name, without ``prefix``.
        section: the names of the dictionaries that were opened, joined by dots.
        prefix: removed from all names.
        skipped: other entries → reason.
        elsewhere: names of dictionaries with tensors, none of which was opened.
    """

    tensors: dict[str, Tensor]
    section: str = ""
    prefix: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()


def is_averaged(section: str) -> bool:
    """Return whether a section holds a moving average of the training weights."""
    return any(name in _AVERAGED for name in section.split("."))


def unwrap(content: Any) -> Unwrapped:
    """Find the tensors of a network: open known dictionaries, then remove the prefixes that all names have.

    An average of the weights is preferred, unless it lacks tensors that the weights themselves have: some scripts
    average the parameters and not the statistics of batch norms.
    """
    opened = _Opener().open(content) if isinstance(content, dict) else None
    if opened is None:
        return Unwrapped({})
    tensors, sections, skipped = opened
    elsewhere = () if tensors else tuple(str(name) for name, value in content.items() if _has_tensors(value))
    prefix = common_prefix(tensors)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Unwrapped(stripped, ".".join(sections), prefix, skipped, elsewhere)


_Opened = tuple[dict[str, Tensor], tuple[str, ...], dict[str, str]]  # tensors, sections, skipped entries


class _Opener:
    """Opens each dictionary once: it may contain itself, and others may contain it in many places."""

    def __init__(self) -> None:
        self._done: dict[int, _Opened | None] = {}

    def open(self, content: dict[Any, Any], depth: int = 0) -> _Opened | None:
        if id(content) not in self._done:
            self._done[id(content)] = None  # while it is being opened
            self._done[id(content)] = self._open(content, depth) if depth < _MAX_NESTING else None
        return self._done[id(content)]

    def _open(self, content: dict[Any, Any], depth: int) -> _Opened:
        found: dict[str, _Opened] = {}
        for name in (*_AVERAGED, *_CURRENT):
            value = content.get(name)
            if isinstance(value, dict) and (inner := self.open(value, depth + 1)) is not None and inner[0]:
                found[name] = inner
        if not found:
            return _own_tensors(content)
        chosen, incomplete = _choose(found)
        tensors, sections, inner_skipped = found[chosen]
        skipped = {}
        for name, value in content.items():
            if name in incomplete:
                skipped[name] = f"an incomplete copy of the weights: it lacks {incomplete[name]!r}; {chosen} was taken"
            elif name in (*_AVERAGED, *_CURRENT) and isinstance(value, dict) and name != chosen:
                skipped[name] = f"another copy of the weights; {chosen} was taken"
            elif isinstance(value, (Tensor, PickledArray)):
                skipped[str(name)] = f"beside the weights in {chosen}"
            elif name != chosen:
                skipped[str(name)] = "state of a training run, not of the model"
        skipped |= {f"{chosen}.{name}": reason for name, reason in inner_skipped.items()}
        return tensors, (chosen, *sections), skipped


def _own_tensors(content: dict[Any, Any]) -> _Opened:
    tensors = {
        name: tensor
        for name, value in content.items()
        if isinstance(name, str) and (tensor := _tensor(value)) is not None
    }
    skipped = {str(name): "not a tensor" for name in content if name not in tensors}
    return tensors, (), skipped


def _tensor(value: Any) -> Tensor | None:
    return value.tensor() if isinstance(value, PickledArray) else value if isinstance(value, Tensor) else None


def _choose(found: Mapping[str, _Opened]) -> tuple[str, dict[str, str]]:
    """Return the copy of the weights to take, and the averages that lack a tensor → its name."""
    current = next((name for name in found if name in _CURRENT), None)
    wanted = set() if current is None else _names(found[current])
    incomplete: dict[str, str] = {}
    for name in found:
        missing = wanted - _names(found[name]) if name in _AVERAGED else set()
        if not missing:
            return name, incomplete
        incomplete[name] = min(missing)
    raise AssertionError("the current weights are complete")


def _names(opened: _Opened) -> set[str]:
    """Names without prefixes and without the counters of batch norms, which inference does not need."""
    prefix = common_prefix(opened[0])
    return {name.removeprefix(prefix) for name in opened[0] if not name.endswith(_COUNTER)}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, (Tensor, PickledArray)) for item in value.values())


def common_prefix(names: Iterable[str]) -> str:
    """Return the concatenation of wrapper prefixes with which all names start; empty if there is none."""
    rest, prefix = list(names), ""
    for _ in range(_MAX_NESTING):
        more = next((p for p in _PREFIXES if rest and all(name.startswith(p) for name in rest)), None)
        if more is None:
            break
        rest, prefix = [name.removeprefix(more) for name in rest], prefix + more
    return prefix


def candidate_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes that wrappers may have added to most of the names, the empty one first."""
    found: Counter[str] = Counter()
    for name in names:
        prefix = ""
        for _ in range(_MAX_NESTING):
            more = next((p for p in _PREFIXES if name.startswith(p, len(prefix))), None)
            if more is None:
                break
            prefix += more
            found[prefix] += 1
    most = [prefix for prefix, _ in found.most_common(_MAX_CANDIDATES)]
    return ["", *sorted(most, key=lambda prefix: (len(prefix), prefix))]
