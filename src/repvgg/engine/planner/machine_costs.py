"""What the cost model knows about a processor: capacities of its caches, and the cycles of parts of the kernels.

A *cycle* is the time of two multiply-adds of vectors in a register tile, whatever the clock of the processor: only the
ratio of the other costs to it decides between candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.codegen.jit import VectorIsa


@final
@dataclass(frozen=True)
class MachineCosts:
    """The constants of :mod:`repvgg.engine.planner.cost_model`; the defaults were fitted on AVX-512.

    They are fitted to timings of RepVGG layers (48 to 384 channels, 14x14 to 56x56, batches 1 and 16) with one and two
    threads, on a server with two 512-bit FMA units.
    """

    # Capacities for the data of a kernel, which shares the caches with code, stacks and the other threads.
    l2_budget_bytes: int = 7 * 2**17  # of 1 MiB
    l3_weights_bytes: int = 2**23  # weights that stay in L3 together with the feature maps
    l3_tiles_bytes: int = 2**24  # transformed tiles that stay in L3

    # Winograd transforms, for each vector of a tile element.
    input_transform_cycles: float = 11.0
    output_transform_cycles: float = 7.0
    l2_miss_factor: float = 1.25  # of both, where the working set of a fused block exceeds L2
    on_the_fly_cycles: float = 2.7  # for each vector of a filter that is transformed into scratch before its GEMM
    interleaved_cycles: float = 2.2  # the same, interleaved with the multiply-adds of the preceding GEMM

    # GEMMs: what a block of channels (kc) costs in addition to its multiply-adds.
    k_block_cycles: float = 4.0
    accumulate_cycles: float = 0.45  # to load and store a vector of products

    # The direct kernel.
    direct_factor: float = 1.15  # rows of an image leave more partial register tiles than the blocks of a GEMM
    direct_cycles_per_pixel: float = 40.0  # for each panel

    work_unit_cycles: float = 300.0  # to claim a work unit and to fill the pipeline

    # Weights, by all threads together: prefetched from memory, or read again from a cache.
    memory_bytes_per_cycle: float = 22.0
    l3_reread_bytes_per_cycle: float = 48.0
    l2_reread_bytes_per_cycle: float = 100.0

    # Transformed tiles of the staged schedule, from the input transform to the GEMM.
    tiles_write_bytes_per_cycle: float = 6.5  # within a core, beyond L2
    tiles_shared_bytes_per_cycle: float = 1.5  # from the L2 of another core, on demand
    tiles_prefetched_bytes_per_cycle: float = 4.0  # the same, prefetched because there are many
    tiles_l3_read_bytes_per_cycle: float = 34.0  # again for each panel
    tiles_memory_read_bytes_per_cycle: float = 9.7


AVX512_COSTS = MachineCosts()

#: Fitted to 14 layers (48 to 512 channels, 7x7 to 112x112, batches 1 and 16) and up to 11 algorithms for each, with two
#: threads on Zen 4, limited to AVX2. The choices by these costs take 5 % longer than the best ones, by those of AVX-512
#: 16 %. Sums of transforms cost less there, as additions have units of their own, and outputs more: 16 registers spill.
AVX2_COSTS = MachineCosts(
    input_transform_cycles=4.5,
    output_transform_cycles=9.4,
    l2_miss_factor=1.46,
    k_block_cycles=5.2,
    accumulate_cycles=0.585,
    direct_factor=1.05,
    direct_cycles_per_pixel=30.8,
    memory_bytes_per_cycle=18.1,
    tiles_shared_bytes_per_cycle=0.61,
)


#: (instruction set, LLVM's name of the processor) that the costs were fitted on, or where no fit was better. Others are
#: calibrated at first use (``calibration.py``).
FITTED_PROCESSORS = frozenset({("avx512", "znver5"), ("avx512", "znver4")})


def machine_costs(isa: VectorIsa) -> MachineCosts:
    """Return the costs of processors with these vector instructions: 32 registers as AVX-512, 16 as AVX2."""
    return AVX512_COSTS if isa.registers >= 32 else AVX2_COSTS
