"""Networks timed in several engines: names of their candidates, the fastest engine of each, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repvgg.studies.counts import title_of
from repvgg.studies.tables import Column, Table, Value, with_quartiles
from repvgg.studies.timing import Speeds


def candidate_name(model: str, engine: str) -> str:
    """Return the name of a network in an engine, in cells; in PyTorch it is that of the network."""
    return model if engine == "torch" else f"{model}.{engine}"


def fastest_engine(speeds: Speeds, model: str, engines: Sequence[str]) -> str | None:
    """Return the engine with the smallest median time; None if the model was measured in none of them."""
    timings = {engine: speeds.timing(candidate_name(model, engine)) for engine in engines}
    seconds = {engine: timing.median_seconds for engine, timing in timings.items() if timing is not None}
    return min(seconds, key=lambda engine: seconds[engine]) if seconds else None


def in_fastest_engine(
    speeds: Speeds, models: Sequence[str], engines: Sequence[str]
) -> tuple[Speeds, dict[str, str | None]]:
    """Return the speed of each model in its fastest engine under its own name, and these engines; None: no time."""
    found = {model: fastest_engine(speeds, model, engines) for model in models}
    # A network that was measured in no engine keeps the name of the first, under which a failure is found.
    return speeds.renamed({model: candidate_name(model, found[model] or engines[0]) for model in models}), found


def engine_table(name: str, fastest: Mapping[str, str | None], speeds: Speeds, engines: Sequence[str]) -> Table:
    """Return the speed of each network in each engine.

    Args:
        name: of the study.
        fastest: the fastest engine of each network.
        speeds: of candidates, named by :func:`candidate_name`.
        engines: in which they were timed.
    """
    columns = [Column("model", "Model"), Column("fastest", "Fastest in")]
    for engine in engines:
        columns += with_quartiles(f"{engine}_images_per_second", f"{engine} (images/s)", 1)
    rows: list[tuple[Value, ...]] = []
    for model, best in fastest.items():
        cells = [cell for engine in engines for cell in speeds.cells(candidate_name(model, engine))]
        rows.append((title_of(model), best, *cells))
    return Table(f"{name}-engines", "Speed in each engine", tuple(columns), tuple(rows), (speeds.extent,))
