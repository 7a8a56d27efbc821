"""Collapse networks of other code bases, compared with the conversions of those code bases.

    python -m benchmarks.collapse_foreign [--networks PATTERN …] [--small] [--out NAME] [--earlier JSON] [--threads 1]

Run it in the repository's folder. The networks are those of ``tests/collapse/foreign``: installed ones (Ultralytics,
transformers, torchvision, segmentation-models-pytorch; the extra ``foreign``) and rebuilt ones, with random weights and
the statistics of their inputs, in float64. Each runs in a process of its own. A row shows, before the conversion, after
the code base's own ("theirs") and after ``repvgg.reparameterize(model, inputs)`` ("ours"): batch norms (modules, or
executed ones if those are more), executed convolutions, parameters; then our largest error relative to the largest
value of an output, the CPU seconds of one call with its proofs (other programs disturb them less than the time on the
clock, which is in the JSON file), and how far its peak memory exceeded that before the call, in multiples of the
float64 weights. "holds" is: nothing of which ours has more than theirs, no norm that could be folded, error at most
1e-10. Exit code 1 if a row does not hold. ``--out`` writes NAME.json and NAME.md; ``--earlier`` adds a column with our
numbers of an earlier run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time
import warnings
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import repvgg
from repvgg.measure import environment
from repvgg.measure.memory import track_peak_memory
from tests.collapse.foreign.catalog import NETWORKS, SMALL
from tests.collapse.foreign.harness import Inputs, Network, count, default_dtype, outputs, relative_error

TOLERANCE = 1e-10
TIMEOUT_SECONDS = 900


def collapse(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, repvgg.Report]:
    with default_dtype(torch.float64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return repvgg.reparameterize(model, inputs)


def measure(network: Network) -> dict[str, Any]:
    """Return a row of the table."""
    row: dict[str, Any] = {"network": network.name, "source": network.source, "conversion": network.conversion}
    model, inputs = network.model(), network.inputs()
    expected = outputs(model, inputs)
    row["before"] = dataclasses.asdict(count(model, inputs))
    converted = network.converted(model)
    theirs = count(converted, inputs)
    row["theirs"] = dataclasses.asdict(theirs)
    row["error_of_theirs"] = relative_error(outputs(converted, inputs), expected)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    del converted
    gc.collect()
    with track_peak_memory() as peak:
        resident = peak() or 0  # the peak was just reset to it
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            plain, report = collapse(model, inputs)
        except Exception as error:
            return row | {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
        row["seconds"] = time.perf_counter() - start
        row["cpu_seconds"] = time.process_time() - cpu_start
        row["peak_to_weights"] = ((peak() or 0) - resident) / weights
    ours = count(plain, inputs)
    row["ours"] = dataclasses.asdict(ours)
    row["error"] = relative_error(outputs(plain, inputs), expected)
    missed = ours.exceeding(theirs)
    if theirs.norms >= ours.norms > network.norms:
        missed.append(f"norms {ours.norms} > {network.norms}")
    if not row["error"] <= TOLERANCE:
        missed.append(f"error {row['error']:.1e}")
    return row | {"missed": missed, "report": str(report).splitlines()[:3]}


def in_process(network: Network, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a network in a new process, so that neither memory nor caches of another one count."""
    if network.package and find_spec(network.package) is None:
        return {"network": network.name, "failure": f"{network.package} is not installed"}
    command = [sys.executable, "-m", "benchmarks.collapse_foreign", "--row", network.name]
    command += ["--threads", str(arguments.threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"network": network.name, "failure": f"more than {TIMEOUT_SECONDS} seconds"}
    if done.returncode:
        return {"network": network.name, "failure": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def verdict(row: dict[str, Any]) -> str:
    return row.get("failure") or "; ".join(row["missed"]) or "holds"


def markdown(rows: list[dict[str, Any]], earlier: dict[str, dict[str, Any]]) -> str:
    """Return the table: a cell of counts has norms, convolutions and parameters.

    Args:
        rows: those of this run.
        earlier: rows of an earlier run by the name of the network; none: no column for them.
    """
    titles = ["network", "original", "theirs", "ours, earlier", "ours", *NUMBERS, "result"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        old = earlier.get(row["network"], {})
        counts = [row.get("before"), row.get("theirs"), old.get("ours"), row.get("ours")]
        numbers = [number_cell(row, old, *field) for field in NUMBERS.values()]
        lines.append([row["network"], *map(counts_cell, counts), *numbers, verdict(row)])
    if not earlier:
        lines = [[*line[:3], *line[4:]] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


NUMBERS = {
    "error": ("error", ".0e"),
    "CPU seconds": ("cpu_seconds", ".1f"),
    "peak / weights": ("peak_to_weights", ".1f"),
}


def number_cell(row: dict[str, Any], old: dict[str, Any], name: str, spec: str) -> str:
    cells = [f"{source[name]:{spec}}" if name in source else "–" for source in (old, row)]
    return " → ".join(cells) if old else cells[1]


def counts_cell(counts: dict[str, int] | None) -> str:
    return f"{counts['norms']} / {counts['convolutions']} / {counts['parameters']:,}" if counts else "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="PATTERN", default=["*"], help="names, * and ? as in a shell")
    parser.add_argument("--small", action="store_true", help="the small variants that the fast tests run")
    parser.add_argument("--out", type=Path, metavar="NAME", help="write NAME.json and NAME.md")
    parser.add_argument("--earlier", type=Path, metavar="JSON", help="our numbers of an earlier run are shown as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.row:
        print(json.dumps(measure(next(n for n in NETWORKS + SMALL if n.name == arguments.row))))
        return 0
    every = SMALL if arguments.small else NETWORKS
    chosen = [network for network in every if any(fnmatch(network.name, p) for p in arguments.networks)]
    if not chosen:
        parser.error(f"no network is named {' or '.join(arguments.networks)}")
    earlier = {}
    if arguments.earlier:
        earlier = {row["network"]: row for row in json.loads(arguments.earlier.read_text(encoding="utf-8"))["rows"]}
    rows = []
    for index, network in enumerate(chosen, 1):
        rows.append(in_process(network, arguments))
        print(f"{index}/{len(chosen)} {network.name}: {verdict(rows[-1])}", file=sys.stderr, flush=True)
        if arguments.out:  # after each row, for a run that is stopped
            written = {"environment": environment(), "rows": rows}
            arguments.out.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
            arguments.out.with_suffix(".md").write_text(markdown(rows, earlier) + "\n", encoding="utf-8")
    print(markdown(rows, earlier))
    holding = sum(verdict(row) == "holds" for row in rows)
    print(f"\n{holding} of {len(rows)} hold")
    return 0 if holding == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
