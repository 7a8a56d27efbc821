"""Fixtures of the block tests."""

import pytest

from repvgg.blocks._cpu.build import build


@pytest.fixture
def compiled():
    """Skip a test that needs the compiled passes where there is no C++ compiler."""
    if build().function is None:
        pytest.skip(build().report)
