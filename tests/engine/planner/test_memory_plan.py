"""Where buffers are: those that live at the same time are apart, the arena is small, and borders are zero when read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repvgg.engine.codegen.jit import GENERIC_ISAS
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.kernels.base import placeholder_weights
from repvgg.engine.kernels.border import BorderKernel
from repvgg.engine.planner import plan as planner
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.cost_model import select_algorithm
from repvgg.engine.planner.memory_plan import BufferAccess, plan_memory
from repvgg.engine.planner.steps import Buffer, Plan
from repvgg.engine.runtime.memory import FeatureMapLayout, aligned_zeros
from tests.engine.helpers import isas, run, with_border
from tests.engine.test_memory_safety import poison
from tests.engine.test_networks import FAST, SLOW, create

LAYOUT, BORDERED = FeatureMapLayout(16, (3, 3), (0, 0), 16), FeatureMapLayout(16, (1, 1), (1, 1), 16)


def buffers(*layouts: FeatureMapLayout) -> list[Buffer]:
    return [Buffer(number, layout, 2) for number, layout in enumerate(layouts)]


def test_buffers_share_memory_once_their_value_is_dead():
    a, b, c, d = buffers(LAYOUT, LAYOUT, LAYOUT, LAYOUT)
    accesses = [
        BufferAccess((), a),
        BufferAccess((a,), b),
        BufferAccess((b,), c),  # a is dead
        BufferAccess((b,), c),  # another region of the same value
        BufferAccess((c, b), d),  # b is still read here
        BufferAccess((d,), d),  # in place
    ]
    plan = plan_memory(accesses)
    assert plan.placed[c] == plan.placed[a]
    assert len(set(plan.placed.values())) == 3
    assert plan.floats == plan.largest_live_set == 3 * a.floats
    assert plan.cleared == ((),) * 6
    assert plan_memory(accesses, returned=[a]).floats == 4 * a.floats


def test_what_the_last_chunked_step_writes_lives_in_all_chunks():
    a, b, c = buffers(LAYOUT, LAYOUT, LAYOUT)
    accesses = [BufferAccess((), a), BufferAccess((a,), b), BufferAccess((b,), c), BufferAccess((c,), c)]
    assert plan_memory(accesses).floats == 2 * a.floats
    assert plan_memory(accesses, num_chunked=3).floats == 3 * a.floats


def test_borders_are_zeroed_where_another_layout_was():
    a, b, c, d, e = buffers(BORDERED, LAYOUT, LAYOUT, BORDERED, LAYOUT)
    accesses = [BufferAccess((), a), *(BufferAccess((one,), two) for one, two in ((a, b), (b, c), (c, d), (d, e)))]
    plan = plan_memory(accesses)
    assert plan.floats == 2 * a.floats
    assert plan.cleared == ((plan.placed[a],), (), (), (plan.placed[d],), ())
    alone = plan_memory([*accesses[:2], BufferAccess((b,), a)])
    assert alone.cleared == ((),) * 3  # a is zero from the beginning


@given(data=st.data())
@settings(max_examples=100)
def test_any_buffers(data):
    """Two runs in which each step fills its buffer: what is read later is still there, within a border of zeros."""

    def integers(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    every = buffers(
        *(FeatureMapLayout(16, (integers(1, 9), 1), (integers(0, 1), 0), 16) for _ in range(integers(1, 12)))
    )
    accesses = [
        BufferAccess(tuple(every[integers(max(0, at - 3), at - 1)] for _ in range(integers(0, 2)) if at), buffer)
        for at, buffer in enumerate(every)
    ]
    plan = plan_memory(accesses)
    assert plan.largest_live_set <= plan.floats <= 1.6 * plan.largest_live_set
    memory = np.zeros(plan.floats)

    def view(buffer: Buffer) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels of a buffer, and its border."""
        assert buffer.offset % 16 == 0
        border, rows = buffer.layout.border[0], memory[buffer.offset :][: buffer.floats].reshape(2, -1, 16)
        return rows[:, border : border + buffer.layout.size[0]], rows[:, :: rows.shape[1] - 1] if border else rows[
            :, :0
        ]

    for _ in range(2):
        for access, cleared in zip(accesses, plan.cleared, strict=True):
            for buffer in cleared:
                view(buffer)[1][:] = 0
            view(plan.placed[access.writes])[0][:] = access.writes.number + 1
            for buffer in access.buffers:
                pixels, border = view(plan.placed[buffer])
                assert (pixels == buffer.number + 1).all()
                assert (border == 0).all()


@pytest.mark.parametrize("planar", [False, True])
def test_border_kernel(planar):
    isa = isas()[-1]
    channels, stride = (3, 1) if planar else (21, 2 * isa.width)
    layout = FeatureMapLayout(channels, (4, 5), (2, 1), stride, (1, 3), planar)
    target = aligned_zeros(3 * layout.image_stride)
    target[:] = 1
    run(BorderKernel(layout, isa.width), target, target, target, target, 2, isa, parts=2)
    maps = with_border(layout, target)
    images = 2 * (channels if planar else 1)
    assert (maps[images:] == 1).all()
    assert (maps[:images, 2:6, 1:6] == 1).all()
    assert maps[:images].sum() == maps[:images, 2:6, 1:6].sum()


def test_a_network_is_right_at_any_number_of_images_in_any_order():
    """Values of one run stay in memory for the next one, where images are fewer or more."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 40, 5, 2, 2), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(40, 16, 3, padding=2), nn.Upsample(scale_factor=3), nn.Conv2d(16, 7, 3, 2, 1)),
    ).eval()
    network = CompiledModel(read(model), [(5, 3, 23, 17)], None, 2)
    assert any(isinstance(step.kernel, BorderKernel) for step in network.plan.steps)
    for count in (5, 1, 4, 2, 5, 3):
        poison(network)
        x = torch.randn(count, 3, 23, 17)
        torch.testing.assert_close(network(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def planned(name: str, size: int = 64, batch: int = 2) -> Plan:
    """Plan a network without packing its weights."""
    graph, target = read(create(name)), Target(GENERIC_ISAS["avx512"])
    input_shapes = [(batch, 3, size, size)]
    shapes = planner.infer_shapes(graph, [(size, size)])
    chunks = planner.chunk_batch(graph, shapes, batch)
    problems = planner.conv_problems(graph, shapes, chunks, batch)
    algorithms = [select_algorithm(problem, target) if problem else None for problem in problems]
    return planner.assemble(graph, input_shapes, shapes, chunks, algorithms, target.isa, placeholder_weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_networks_need_little_more_than_their_largest_live_set(name):
    plan = planned(name, 97 if "pspnet" in name else 128)
    assert plan.largest_live_set <= plan.memory_floats <= 1.1 * plan.largest_live_set
