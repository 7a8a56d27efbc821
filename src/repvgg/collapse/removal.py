"""Which modules the plain model does without: those that no call uses, and those on whose results no output depends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import fx, nn

from repvgg.collapse.code import code_facts
from repvgg.collapse.modules import has_parameters, is_inside, join, path_below, paths_around
from repvgg.collapse.record import record
from repvgg.collapse.recording import Frame, Recording
from repvgg.collapse.report import Skipped
from repvgg.collapse.unread import Unread, is_read, unread_modules
from repvgg.collapse.validity import Validity
from repvgg.collapse.variants import recorded_call

_NOT_IN_CALL = "no call like the given inputs uses it"


class Removals:
    """The modules to remove.

    Args:
        validity: the recording, and what holds in other calls.
        excluded: paths of modules that must stay, and why.
    """

    def __init__(self, validity: Validity, excluded: dict[str, str]) -> None:
        self.validity, self.recording, self.excluded = validity, validity.recording, excluded
        self._in_training: dict[str, set[str] | None] = {}

    @cached_property
    def unread(self) -> dict[str, Unread]:
        """The modules whose results no output depends on, each with what takes its place."""
        return {
            path: Unread(axes)
            for frame, path, axes in unread_modules(self.recording, lambda: self.validity.similar)
            if not self.validity.is_called_by_a_method(frame.path, path) and self._stays_unread(frame, path)
        }

    def _stays_unread(self, frame: Frame, path: str) -> bool:
        """Whether a module is not read in other calls either, those aside that the plain model refuses."""
        if any(is_inside(other, path) or is_inside(path, other) for other in self.excluded):
            return False
        name = path_below(path, frame.path)
        return self.validity.why_unsafe(frame.path, lambda other: is_read(other, name), "may read it") is None

    def not_run(self) -> Iterator[str]:
        """Yield the outermost modules with parameters that did not run, and whose parameters nothing read."""
        used = paths_around({*self.recording.called_paths(), *self.recording.users})
        done: list[str] = []
        for path, part in self.recording.module.named_modules():
            if not path or any(is_inside(path, other) for other in done) or not has_parameters(part):
                continue
            if isinstance(part, (nn.ModuleList, nn.ModuleDict)):  # code may iterate over it
                continue
            if path not in used:
                done.append(path)
                yield path

    @cached_property
    def unused(self) -> list[Skipped]:
        """The modules with parameters that no call in eval mode uses, outermost ones only."""
        return [Skipped(path, reason) for path in self.not_run() if (reason := self._why_removed(path)) is not None]

    def _why_removed(self, path: str) -> str | None:
        """Return why the plain model does without a module that did not run; None if it stays."""
        owner = path.rpartition(".")[0]
        while owner and owner not in self.validity.frames:
            owner = owner.rpartition(".")[0]
        name = path_below(path, owner)
        reason = self._why_unused(owner, name, path)
        if reason is None:
            return None
        if reason == _NOT_IN_CALL and self._may_run(owner, path):
            self.validity.guard_call(owner)

        def may_run(other: Recording) -> bool:
            return any(is_inside(called, name) for called in other.called_paths())

        return reason if self.validity.why_unsafe_settings(owner, may_run) is None else None

    def _may_run(self, owner: str, path: str) -> bool:
        """Whether another call of ``owner`` may run the module at ``path``, as far as is known."""
        variants = self.validity.variants(owner)
        takes_structures = any(not isinstance(value, fx.Node) for value in self.validity.frames[owner][0].args)
        return (
            takes_structures
            or variants.unknown is not None
            or any(is_inside(join(owner, called), path) for v in variants.recordings for called in v.called_paths())
        )

    def _called_in_training(self, owner: str) -> set[str] | None:
        """Return the paths below a module that its forward calls in training mode; None if it does not run."""
        if owner not in self._in_training:
            module, frame = self.recording.module.get_submodule(owner), self.validity.frames[owner][0]
            try:
                training = record(module, recorded_call(frame), mode={"": True}, on_meta=self.recording.on_meta)
            except Exception:
                self._in_training[owner] = None
            else:
                self._in_training[owner] = training.called_paths()
        return self._in_training[owner]

    def _why_unused(self, owner: str, name: str, path: str) -> str | None:
        module, frame = self.recording.module.get_submodule(owner), self.validity.frames[owner][0]
        if self.validity.is_called_by_a_method(owner, path) or any(is_inside(other, path) for other in self.excluded):
            return None
        if code_facts(module).reads_training:
            # None where that does not run, such as an auxiliary head on a small image: then the call decides.
            called = self._called_in_training(owner)
            if called is not None and any(is_inside(other, name) for other in called):
                return "the forward calls it in training mode only"
        if not self.validity.trusted or (frame.decisions and self._may_run(owner, path)):
            return None  # no guard sees which way a decision will go
        return _NOT_IN_CALL
