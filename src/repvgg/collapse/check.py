"""Whether the code around what was replaced still does what it did: it is traced again, over the new parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repvgg.collapse.capture import Capture, capture, is_plain_sequence
from repvgg.collapse.planned import Plan
from repvgg.collapse.reach import only_calls


def depends_on_its_parts(model: nn.Module, plain: nn.Module, plan: Plan, kept: dict[int, str]) -> dict[int, str]:
    """Modules that have to stay, because a forward around them looks at what they are, and not only calls them.

    Such a forward asks for a class or an attribute of a part, and would take another way over the convolution in its
    place. Its graph over the new parts then is another one, or there is none.

    Args:
        model: the original.
        plain: what was made of it.
        plan: what was replaced.
        kept: modules that stay already.
    """
    found: dict[int, str] = {}
    replaced = [whole.path for whole in plan.wholes] + plan.dropped
    replaced += [path for unit in plan.units for path in unit.changed()]
    for path, captured in plan.captured.items():
        old, new = model.get_submodule(path), part_at(plain, path)
        if new is None or type(new) is not type(old) or not any(_inside(inner, path) for inner in replaced):
            continue
        if not is_plain_sequence(new) and not only_calls(new) and not _same(captured, new):
            reason = f"the forward of {path or 'the model'} looks at what it is"
            found |= {id(part): reason for part in old.modules() if part is not old and id(part) not in kept}
    return found


def part_at(plain: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, or None where there is none any more."""
    try:
        return plain.get_submodule(path)
    except AttributeError:  # it is part of what was replaced
        return None


def _inside(inner: str, outer: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def _same(captured: Capture, new: nn.Module) -> bool:
    try:
        again = capture(new)
    except Exception:  # the code does not find what it looks for
        return False
    before = [captured.graph, *(variant.graph for variant in captured.variants)]
    after = [again.graph, *(variant.graph for variant in again.variants)]
    return list(map(str, before)) == list(map(str, after)) and _same_constants(captured, again)


def _same_constants(before: Capture, after: Capture) -> bool:
    names = [str(n.target) for n in before.graph.nodes if n.op == "get_attr" and str(n.target).startswith("_tensor")]
    pairs = [(getattr(before.root, name), getattr(after.root, name)) for name in names]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))
