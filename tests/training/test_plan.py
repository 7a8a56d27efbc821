"""How batches are spread, and what follows for the learning rate."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repvgg.errors import UsageError
from repvgg.training import BatchPlan, OptimConfig, TrainConfig, plan_batches
from tests.training.helpers import CONFIG

SMALL = st.integers(1, 32)


@given(images=SMALL, rounds=SMALL, devices=SMALL, lr=st.floats(1e-4, 10), meant_for=st.integers(1, 4096))
def test_what_was_asked_for_is_what_is_done(images, rounds, devices, lr, meant_for):
    batch = images * rounds * devices
    if batch < 2:
        return
    config = TrainConfig(batch_size=batch, device_batch=images, optim=OptimConfig(lr=lr, lr_batch=meant_for))
    plan = plan_batches(config, devices)
    assert (plan.device_batch, plan.accumulation, plan.world_size) == (images, rounds, devices)
    assert plan.global_batch == batch
    assert plan.lr == pytest.approx(lr * batch / meant_for)
    assert plan_batches(replace(config, optim=replace(config.optim, lr_batch=None)), devices).lr == lr


@given(batch=st.integers(2, 512), devices=st.integers(1, 8), images=st.none() | st.integers(1, 600))
def test_the_global_batch_is_kept_or_refused(batch, devices, images):
    config = TrainConfig(batch_size=batch, device_batch=images)
    try:
        plan = plan_batches(config, devices)
    except UsageError:
        assert batch % devices or (batch // devices) % min(images, batch // devices)
    else:
        assert plan.global_batch == batch
        assert plan.device_batch <= (images or batch)


def test_refusals_say_what_to_do():
    with pytest.raises(UsageError, match=r"batch of 16 does not divide evenly over 3 devices: "):
        plan_batches(CONFIG, 3)
    with pytest.raises(UsageError, match=r"of each device are not a multiple of 5 at a time: choose a device_batch"):
        plan_batches(replace(CONFIG, device_batch=5))


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (BatchPlan(64, 1, 1, 0.1, 1.0), "global batch 64 (one device), learning rate 0.1"),
        (BatchPlan(8, 4, 1, 0.1, 1.0), "global batch 32 (8 at a time, accumulated 4 times), learning rate 0.1"),
        (
            BatchPlan(32, 1, 8, 0.1, 1.0),
            "global batch 256 (32 on each of 8 devices), learning rate 0.1",
        ),
        (
            BatchPlan(32, 2, 8, 0.2, 2.0),
            "global batch 512 (32 on each of 8 devices, accumulated 2 times), learning rate 0.2, scaled by 2 with the "
            "batch",
        ),
    ],
)
def test_said_aloud(plan, text):
    assert str(plan) == text
