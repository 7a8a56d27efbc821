"""Blocks of tests are too small to share among threads, and the machine may be busy."""

import pytest
import torch

from repvgg.blocks.native import build


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiled():
    """For tests that need the compiled passes: skips where there is no C++ compiler."""
    if build().function is None:
        pytest.skip(build().report)
