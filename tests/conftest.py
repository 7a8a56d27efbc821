"""Fixtures and settings of all tests.

Property tests draw the same examples in each run, so that a failure is reproducible; ``make slow`` draws new ones
(``--hypothesis-profile explore``).
"""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("repeatable")

# Scripts that tests start in subprocesses import from the package `tests`, too.
_ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models of tests are too small to share among threads, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """An empty cache folder: tests do not find the files of other runs, and leave none in the user's cache."""
    # Workers have a base folder each, below that of the run. Compiling the C++ passes takes 12 s of CPU time: the first
    # worker that needs them compiles for all.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPVGG_CACHE_DIR", str(folder))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_calibration():
    """Plans do not depend on how busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPVGG_CALIBRATE", "off")
        yield


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """Exempt what was imported so far from garbage collection: code that collects before it measures would scan it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def thawed_at_exit():
    """Compiled extensions report what is still alive when the interpreter exits."""
    yield
    gc.unfreeze()
