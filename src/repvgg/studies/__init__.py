"""Tables and figures of the paper, made on this machine.

Each study measures cell by cell, stores every cell at once, and writes tables, charts and a page. The modules are
imported on demand: a study of speed does not load the training stack.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from repvgg.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from repvgg.studies.base import Study

#: Name of each study, and the module that holds it in its ``STUDIES``.
STUDY_MODULES = {
    "table1": "block_speed",
    "table4": "network_speed",
    "table5": "network_speed",
    "table6": "ablation",
    "table6-speed": "block_speed",
    "table7": "ablation",
    "blocks": "ablation",
    "figure1": "accuracy_speed",
    "figure3": "figure3",
    "mobile": "accuracy_speed",
}


def find_study(name: str) -> Study:
    """Return the study called ``name``.

    Raises:
        UsageError: there is none; the text lists the closest names, or all of them.
    """
    if name not in STUDY_MODULES:
        advice = did_you_mean(name, STUDY_MODULES, f"choose one of {', '.join(STUDY_MODULES)}.")
        raise UsageError(f"There is no study {name!r}: {advice}")
    module = import_module(f"repvgg.studies.{STUDY_MODULES[name]}")
    studies: tuple[Study, ...] = module.STUDIES
    return next(study for study in studies if study.name == name)


def all_studies() -> dict[str, Study]:
    """Return every study by its name."""
    return {name: find_study(name) for name in STUDY_MODULES}
