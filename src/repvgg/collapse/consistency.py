"""Check that the forwards around replaced parts still do the same: they may read the class or attributes of a part."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from repvgg._calls import Call
from repvgg.collapse.modules import is_inside, is_leaf, join, path_below, submodule_or_none
from repvgg.collapse.plan import Plan, Reasons, Scope, record_call
from repvgg.collapse.recording import Frame, Recording, is_constant
from repvgg.errors import typed_line


def find_dependents(plan: Plan, plain: nn.Module) -> tuple[Reasons, tuple[Recording, Call] | None]:
    """Return modules that must stay because a forward around them depends on more than their output.

    The plain model is recorded with the call that the model was recorded with; each forward that was not rewritten
    must run the same functions and call the same modules, in the same order. The recording is returned as well, with
    the call, if it is one of the whole model.
    """
    found: Reasons = {}
    known: tuple[Recording, Call] | None = None
    for scope in plan.scopes:
        part = submodule_or_none(plain, scope.path)
        if part is None or is_leaf(part) or not (scope.regions.all or scope.unread):
            continue
        try:
            again = record_call(part, scope.call)
        except Exception as error:
            path = getattr(error, "frame_path", "")
            changed = [(path if submodule_or_none(scope.module, path) is not None else "", typed_line(error))]
        else:
            known = known if scope.path else (again, scope.call)
            changed = [(path, "") for path in _changed_forwards(scope, again)]
        for path, cause in changed:
            old = scope.module.get_submodule(path)
            if missing := _dropped_inside(plan, scope, path):
                reason = f"the forward of {path or 'the model'} uses no result of it and reads it"
                found |= dict.fromkeys(missing, reason)
                continue
            if path in scope.rewritten_paths():
                found[old] = f"its new forward is not equal to the old one: it does not run ({cause})"
                continue
            reason = f"the forward of {path or 'the model'} depends on the class or attributes of its parts"
            found |= {inner: reason for inner in old.modules() if inner is not old}
    return found, known


def _dropped_inside(plan: Plan, scope: Scope, path: str) -> list[nn.Module]:
    """Return the dropped modules inside the module at ``path`` of a scope: without them its forward may not run."""
    outer = join(scope.path, path)
    dropped = [*(skipped.name for skipped in plan.dropped), *plan.unread()]
    names = [name for name in dropped if is_inside(name, outer)]
    return [scope.module.get_submodule(path_below(name, scope.path)) for name in names]


def _changed_forwards(scope: Scope, again: Recording) -> list[str]:
    """Return the paths of the forwards that do something else in another recording of a scope."""
    rewritten, replaced = scope.rewritten_paths(), scope.replaced_paths()
    mine = {frame.path: _actions(frame) for frame in scope.recording.root.frames()}
    theirs = {frame.path: _actions(frame) for frame in again.root.frames()}
    skipped = rewritten | {
        path for path in mine if any(is_inside(path, done) for done in replaced) or path not in theirs
    }
    return [path for path, actions in mine.items() if path not in skipped and theirs[path] != actions]


def _actions(frame: Frame) -> list[Any]:
    """Return the functions and modules that a forward calls, without constants, such as a weight that is folded now."""
    items = [item for item in frame.items if isinstance(item, Frame) or not is_constant(item)]
    return [item.target if isinstance(item, fx.Node) else item.path for item in items]
