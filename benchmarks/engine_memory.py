"""How much memory the feature maps of a network take in the engine, and how much they need.

    python -m benchmarks.engine_memory [--batch 1] [--size 224] [NETWORK …]

Run it in the repository's folder. Networks are "LIBRARY NAME" as in ``tests/engine/test_networks.py``, by default all
of those, after ``reparameterize``. Columns: MiB of the arena that holds all feature maps; of the largest set of them
that lives at the same time, which is the least possible; their ratio; and the sum over all maps without sharing.
"""

from __future__ import annotations

import argparse

import repvgg
from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.frontend import read
from repvgg.engine.kernels.base import placeholder_weights
from repvgg.engine.planner import plan as planner
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.cost_model import select_algorithm
from repvgg.engine.planner.steps import Plan
from tests.engine.test_networks import FAST, SLOW, create


def planned(name: str, size: int, batch: int) -> Plan:
    """Plan a network without packing its weights."""
    plain, _ = repvgg.reparameterize(create(name))
    shapes, target = [(batch, 3, size, size)], Target(host_isa(), 2)
    graph = read(plain, shapes)
    values = planner.infer_shapes(graph, [(size, size)])
    chunks = planner.chunk_batch(graph, values, batch)
    problems = planner.conv_problems(graph, values, chunks, batch)
    algorithms = [select_algorithm(problem, target) if problem else None for problem in problems]
    return planner.assemble(graph, shapes, values, chunks, algorithms, target.isa, placeholder_weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*FAST, *SLOW])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    print("| network | arena, MiB | largest live set | ratio | buffers, if each were apart |")
    print("|---|---|---|---|---|")
    for name in arguments.networks:
        plan = planned(name, 257 if "pspnet" in name else arguments.size, arguments.batch)
        arena, least, apart = (
            floats / 2**18
            for floats in (plan.memory_floats, plan.largest_live_set, sum(one.floats for one in plan.buffers))
        )
        print(f"| {name} | {arena:.2f} | {least:.2f} | {arena / least:.3f} | {apart:.2f} |", flush=True)


if __name__ == "__main__":
    main()
