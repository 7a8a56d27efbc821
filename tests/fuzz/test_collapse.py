"""Random networks, collapsed: equal in float64 on two image sizes, no more expensive, and plain after one call.

On failure hypothesis prints the smallest program that fails; ``check(<that program>)`` replays it.
"""

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.check import check
from tests.fuzz.strategies import programs

# an even kernel with one more pixel of padding at the end becomes padding="same", for which torch warns of a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
COMMON = {"database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=14, **COMMON)
@given(programs())
def test_random_networks(program):
    check(program)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@seed(20)
@settings(max_examples=300, **COMMON)
@given(programs())
def test_many_random_networks(program):
    check(program)
