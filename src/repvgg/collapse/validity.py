"""Whether what a recording shows of a module holds in other calls, and what the plain model must check for that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property

from repvgg.collapse.code import code_facts
from repvgg.collapse.guard import CallGuard
from repvgg.collapse.modules import path_below
from repvgg.collapse.recording import Decision, Frame, Recording
from repvgg.collapse.settings import Setting, export_setting
from repvgg.collapse.variants import Variants, appearance, find_variants


class Validity:
    """Compares the recorded call of each module with others; see :mod:`repvgg.collapse.variants`.

    Args:
        recording: the recorded call.
        record_similar: returns the recording of a call with inputs of other sizes, None if the model takes none; and
            whether it is one of small images, on which the model runs the same.
        trusted: whether the recorded call is how the model is used. What only holds for calls like it is then merged,
            and guarded; else it is left.

    Attributes:
        frames: the calls of each module, by its path.
        guards: what the plain model must check, by the path of the module.
    """

    def __init__(
        self, recording: Recording, record_similar: Callable[[], tuple[Recording | None, bool]], *, trusted: bool
    ) -> None:
        self.recording, self._record_similar, self.trusted = recording, record_similar, trusted
        self.frames: dict[str, list[Frame]] = defaultdict(list)
        for frame in recording.root.frames():
            self.frames[frame.path].append(frame)
        self.guards: dict[str, CallGuard] = {}
        self._variants: dict[str, Variants] = {}
        self._variants_of: dict[Hashable, Variants] = {}

    @cached_property
    def _similar(self) -> tuple[Recording | None, bool]:
        return self._record_similar()  # when something first depends on it

    @property
    def similar(self) -> Recording | None:
        """The recording of a call with inputs of other sizes."""
        return self._similar[0]

    @property
    def holds_for_small_images(self) -> bool:
        """Whether the model runs the same on small images as on the recorded ones, which are large."""
        return self._similar[1]

    def variants(self, path: str) -> Variants:
        """Return the other branches that the forward of a module may take."""
        if path not in self._variants:
            frame = self.frames[path][0]
            alike = appearance(self.recording, frame)  # the blocks of a stage are
            found = self._variants_of.get(alike) or find_variants(self.recording, frame)
            if not found.read_values:
                self._variants_of[alike] = found
            self._variants[path] = found
        return self._variants[path]

    def why_unsafe(self, path: str, differs: Callable[[Recording], bool], text: str) -> str | None:
        """Return why something does not hold in other calls of a module, those aside that the plain model will refuse.

        Args:
            path: of the module.
            differs: whether it does not hold in a recording of the module.
            text: a clause about the forward, for when it does not.
        """
        variants = self.variants(path)
        may_differ = variants.unknown is not None or any(map(differs, variants.recordings))
        around = f"the forward of {path or 'the model'}"
        if may_differ and self.trusted and (asked := self._unchecked_decision(path)):
            return f"{around} {variants.unknown or f'asks for a property of its input ({asked.where})'}"
        if may_differ and not self.trusted:
            return f"{around} {variants.unknown or text}: pass inputs="
        reason = self.why_unsafe_settings(path, differs)
        if reason is None and may_differ:
            self.guard_call(path)
        return reason

    def _unchecked_decision(self, path: str) -> Decision | None:
        decisions = self.frames[path][0].decisions
        return next((one for one in decisions if not one.known or one.unchecked), None)

    def why_switched(self, path: str) -> str | None:
        """Return why a module that runs a part of a region may skip the rest, by a switch that cannot be tried."""
        facts = code_facts(self.recording.module.get_submodule(path))
        around = f"the forward of {path or 'the model'}"
        if facts.gradient_switches:
            return f"{around} asks whether gradients are recorded ({facts.gradient_switches[0]})"
        for setting in map(export_setting, facts.export_switches):
            if setting is not None and not self.trusted:
                return f"{around} asks whether it is being exported ({setting.path[0]}): pass inputs="
            if setting is not None:
                self._guard_setting(path, setting)
        return None

    def why_unsafe_settings(self, path: str, differs: Callable[[Recording], bool]) -> str | None:
        """Let the plain model check what the code of a module reads and branches on, or return why it cannot."""
        for setting, other in self.variants(path).settings:
            if (other is None or differs(other)) and (reason := self._guard_setting(path, setting)):
                return reason
        return None

    def _guard_setting(self, path: str, setting: Setting) -> str | None:
        if setting.is_changed and not setting.is_attribute:
            return f"the forward of {path or 'the model'} reads {setting.name}, which it may change"
        known = self.guards.get(path, CallGuard(path, {}))
        if setting.name not in {one.name for one in known.settings}:
            self.guards[path] = replace(known, settings=(*known.settings, setting))
        return None

    def guard_call(self, path: str) -> None:
        """Let the plain model check that the module is called as it was recorded."""
        frame = self.frames[path][0]
        guard = CallGuard.of(path, frame, self.recording.module.get_submodule(path), sizes=bool(frame.decisions))
        known = self.guards.get(path, guard)
        self.guards[path] = replace(guard, settings=known.settings)

    def is_called_by_a_method(self, owner: str, path: str) -> bool:
        """Whether a public method of a module calls a part of it at ``path`` by its name."""
        facts = code_facts(self.recording.module.get_submodule(owner))
        name = path_below(path, owner).partition(".")[0]
        return any(name in called for method, called in facts.calls.items() if not method.startswith("_"))
