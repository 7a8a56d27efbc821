"""Is it converted? What a model is made of, and what could still be merged in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from repvgg._contexts import gc_paused
from repvgg.collapse.modules import batch_norms, join, unwrap
from repvgg.collapse.plan import make_plan
from repvgg.collapse.planned import Plan
from repvgg.collapse.tracing import random_state_kept

_SHOWN = 5


@dataclass(frozen=True)
class ModelSummary:
    """What :func:`model_summary` found.

    Attributes:
        parameters: how many numbers are trained.
        convolutions: how many of each kind, such as ``{"3x3": 22}``; linear layers are "linear".
        batch_norms: paths of the batch norms.
        mergeable: paths of what could be merged: the first part of each linear region of more than one operation.
    """

    parameters: int
    convolutions: dict[str, int]
    batch_norms: tuple[str, ...]
    mergeable: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is converted: no batch norm and nothing to merge is left."""
        return not self.batch_norms and not self.mergeable

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data, for JSON."""
        return {**asdict(self), "is_plain": self.is_plain}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "converted: a plain network" if self.is_plain else "not converted: call repvgg.reparameterize"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.convolutions.items())
        yield f"  {self.parameters:,} parameters; convolutions: {kinds or 'none'}"
        for title, names in (("regions to merge", self.mergeable), ("batch norms", self.batch_norms)):
            if names:
                more = len(names) - _SHOWN
                rest = f" and {more} more" if more > 0 else ""
                yield f"  {len(names)} {title}: {', '.join(name or '(root)' for name in names[:_SHOWN])}{rest}"


def model_summary(model: nn.Module, inputs: Tensor | Sequence[Tensor] | None = None) -> ModelSummary:
    """Answer whether a model is converted, and if not, what is left to do.

    Nothing is computed with the weights, and the mode of the model does not matter. Batch norms that no convolution is
    next to stay when :func:`repvgg.reparameterize` is called; its report says why.

    Args:
        model: any module.
        inputs: a tensor, or several, that the model takes: shapes are read off them where its functions do not tell.
    """
    model = unwrap(model)[0]
    with random_state_kept(), gc_paused():
        plan = make_plan(model, merge_branches=True, inputs=[inputs] if isinstance(inputs, Tensor) else inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    norms = tuple(name for name, _ in batch_norms(model))
    kinds = Counter(_kind(part) for part in model.modules() if isinstance(part, (_ConvNd, nn.Linear)))
    return ModelSummary(parameters, dict(kinds.most_common()), norms, tuple(_mergeable(plan)))


def _kind(part: nn.Module) -> str:
    if not isinstance(part, _ConvNd):
        return "linear"
    size = "x".join(map(str, part.kernel_size))
    return f"{size} transposed" if part.transposed else size


def _mergeable(plan: Plan) -> Iterator[str]:
    yield from (whole.path for whole in plan.wholes)
    for unit in plan.units:
        for region, _ in (*unit.regions.found, *unit.regions.scaled):
            node = region.first_convolution
            inner = str(node.target) if node.op == "call_module" else region.flat.owner(node)
            yield join(unit.path, inner)
