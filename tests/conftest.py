"""What holds for every test.

Property tests draw the same examples in each run, so that what lands does not hang on luck; ``make slow`` draws new
ones (``--hypothesis-profile explore``).
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

# Scripts that tests start as processes of their own import from the package `tests`, too.
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
    """Machine code of these tests alone: neither do they find that of other runs, nor leave any behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPVGG_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def modules_out_of_the_collectors_way():
    """What was imported stays: code that collects garbage before it measures would look at all of it each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
