"""Tables and figures of the paper, reproduced on this machine.

Each study measures cell by cell, stores every cell at once, and writes tables, charts and a page. Modules are imported
on demand: a study of speed does not load the training stack.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from repvgg.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from repvgg.studies.base import Study

#: The module that lists each study in its ``STUDIES``, by the name of the study.
STUDY_MODULES = {
    "table1": "block_speed",
    "table4": "network_speed",
    "table5": "network_speed",
    "table6": "ablation",
    "table6-speed": "block_speed",
    "table7": "ablation",
    "table8": "segmentation",
    "blocks": "ablation",
    "figure1": "network_speed",
    "figure3": "figure3",
    "int8": "int8",
    "mobile": "network_speed",
}


def find_study(name: str) -> Study:
    """Return a study by its name.

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
