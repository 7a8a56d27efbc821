"""The studies, by name. A new one is a module and a line here."""

from __future__ import annotations

from repvgg.errors import UsageError, did_you_mean
from repvgg.studies import block_study, figure1, figure3, mobile, table1, table4, table5, table6, table6_speed, table7
from repvgg.studies.study import Study

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (table1, table4, table5, table6, table6_speed, table7, block_study, figure1, figure3, mobile)
}


def study_of(name: str) -> Study:
    """The study called ``name``.

    Raises:
        UsageError: there is none; the text lists the names that are closest, or all of them.
    """
    if name in STUDIES:
        return STUDIES[name]
    known = did_you_mean(name, STUDIES, f"there are {', '.join(STUDIES)}.")
    raise UsageError(f"There is no study {name!r}: {known}")
