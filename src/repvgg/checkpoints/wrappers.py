"""What training scripts put around weights: dictionaries around the tensors, prefixes in front of their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # the first that is there is taken
_PREFIXES = ("module.", "_orig_mod.", "model.")
_DEEPEST = 8  # wrappers within wrappers
_TENSORS = "another copy of the weights"
_STATE = "state of a training run, not of the model"


@dataclass(frozen=True, eq=False)
class Unwrapped:
    """The tensors in a torch file.

    Attributes:
        tensors: by name, without what wrappers put in front of every one.
        section: the entries that were opened to get at them, with dots between.
        prefix: what was taken off the names.
        passed_over: the reason for each entry of the file that was not taken.
    """

    tensors: dict[str, Tensor]
    section: str
    prefix: str
    passed_over: dict[str, str]


def unwrap(content: Any) -> Unwrapped:
    """Open wrapping dictionaries and take off wrapping prefixes."""
    opened: list[str] = []
    passed_over: dict[str, str] = {}
    while isinstance(content, dict) and len(opened) < _DEEPEST:
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if wrapper is None:
            break
        for name, value in content.items():
            if name != wrapper:
                passed_over[".".join((*opened, str(name)))] = _reason(name, value, wrapper)
        opened.append(wrapper)
        content = content[wrapper]
    section = ".".join(opened)
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    passed_over |= {str(name): "not a tensor" for name, _ in entries if name not in tensors}
    prefix = common_prefix(tensors)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Unwrapped(stripped, section, prefix, passed_over)


def _reason(name: object, value: object, taken: str) -> str:
    """Why an entry beside the one that was taken was not."""
    return f"{_TENSORS}; {taken} was taken" if name in _WRAPPERS and isinstance(value, dict) else _STATE


def common_prefix(names: Iterable[str]) -> str:
    """What wrappers (DataParallel, compile, a Lightning module) put in front of every name; empty if nothing."""
    rest, prefix = list(names), ""
    while more := next((p for p in _PREFIXES if rest and all(name.startswith(p) for name in rest)), None):
        rest, prefix = [name.removeprefix(more) for name in rest], prefix + more
    return prefix


def prefixes_of(names: Iterable[str]) -> list[str]:
    """All that wrappers may have put in front of some of the names, the empty text first."""
    found = {""}
    for name in names:
        prefix = ""
        while more := next((p for p in _PREFIXES if name.startswith(p, len(prefix))), None):
            prefix += more
            found.add(prefix)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))
