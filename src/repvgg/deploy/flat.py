"""A model with inputs and outputs of any structure, as files hold it: from named tensors to named tensors.

A program of ``torch.export`` also holds the structure of its output.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from repvgg._calls import Call, signature_of
from repvgg._contexts import eval_mode
from repvgg._structure import as_builtins, describe, leaves, map_leaves, tensors
from repvgg.errors import ExportError, typed_line

IMAGE = "image"
LOGITS = "logits"

_STORED = (Tensor, bool, int, float, torch.SymInt)  # torch.export saves texts and cannot load them


class FlatModule(nn.Module):
    """``model`` as a function from the tensors of a call, in order, to a tuple of the tensors that it returns.

    All other arguments are those of the call. What is no tensor in the output is left out.

    Args:
        model: the model.
        call: how it is called.
        structured: return dictionaries, lists and tuples, as the model does, in place of one tuple: a dictionary for
            a dataclass or another object, and None for values that are neither tensors nor numbers.

    Attributes:
        inputs: names of the tensors, from the parameters of the forward; ``image`` for a single one.
        outputs: names of the tensors that are returned, as of ``output['boxes'][0]``: ``boxes_0``; ``logits`` for a
            single one.

    Raises:
        ExportError: the model does not run on the call, or returns no tensor.
    """

    def __init__(self, model: nn.Module, call: Call, *, structured: bool = False) -> None:
        super().__init__()
        self.model, self.call, self.structured = model, call, structured
        self.training = model.training
        found = _named_leaves(model, call)
        single = len(found) == 1 and len(call.args) == 1 and isinstance(call.args[0], Tensor)
        self.inputs = [IMAGE] if single else _distinct([_identifier(name) for name, _ in found])
        output = _output_of(model, call)
        names = [name for name, leaf in leaves(output, "") if isinstance(leaf, Tensor)]
        if not names:
            raise ExportError(f"The model returns {describe(output)}: only models that return tensors can be exported.")
        # A tensor alone needs no wrapper, which would be in the names of the exported weights.
        self.is_plain = single and isinstance(output, Tensor)
        self.outputs = [LOGITS] if len(names) == 1 else _distinct([_identifier(name) for name in names])

    def forward(self, *flat: Tensor) -> Any:
        """Return the tensors of the model's output, for the tensors of its arguments."""
        values = iter(flat)
        output = self.call.map_tensors(lambda _: next(values))(self.model)
        return as_builtins(map_leaves(_stored, output)) if self.structured else tuple(tensors(output))


def _named_leaves(model: nn.Module, call: Call) -> list[tuple[str, Any]]:
    """Return the tensors of a call with their names, in its order."""
    signature = signature_of(model)
    parameters = [] if signature is None else list(signature.parameters.values())
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"input_{place}" for place in range(len(names), len(call.args))]
    arguments = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return [leaf for name, value in arguments for leaf in leaves(value, name) if isinstance(leaf[1], Tensor)]


def _output_of(model: nn.Module, call: Call) -> Any:
    try:
        with eval_mode(model), torch.no_grad():
            return call.map_tensors(torch.clone)(model)
    except Exception as error:  # user code
        raise ExportError(f"The model cannot be exported for {call!r}: {typed_line(error)}.") from error


def _stored(leaf: Any) -> Any:
    """Return what a program can hold of a leaf."""
    is_empty = type(leaf) in (tuple, list, dict)  # an empty container is a leaf
    return leaf if isinstance(leaf, _STORED) or is_empty else None


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "output"


def _distinct(names: list[str]) -> list[str]:
    """Return the names with a number behind each that occurs before."""
    out: list[str] = []
    for name in names:
        taken = sum(other == name or other.startswith(f"{name}__") for other in out)
        out.append(f"{name}__{taken}" if taken else name)
    return out
