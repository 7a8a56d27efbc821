"""What the tests of blocks share."""

import pytest

from repvgg.blocks._cpu.build import build


@pytest.fixture
def compiled():
    """For tests that need the compiled passes: skips where there is no C++ compiler."""
    if build().function is None:
        pytest.skip(build().report)
