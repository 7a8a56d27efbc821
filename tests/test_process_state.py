"""What belongs to the process stays as it is while the library works in several threads."""

import io
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch import nn

import repvgg
from repvgg.checkpoints import read_checkpoint
from repvgg.data.decode import decode
from tests.bn_statistics import trained_like

THREADS = 4


def block():
    torch.manual_seed(0)
    return trained_like(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))).eval()


def image():
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def work(tmp_path):
    torch.save(block().state_dict(), tmp_path / "a.pth")
    model, images, data = block(), torch.randn(2, 3, 8, 8), image()
    plain, _ = repvgg.reparameterize(model)
    return {
        "collapse": lambda: repvgg.reparameterize(model, images),
        "verify": lambda: repvgg.verify(model, plain, images).raise_if_failed(),
        "checkpoint": lambda: read_checkpoint(tmp_path / "a.pth"),
        "image": lambda: decode(data, "a.png").load(),
    }


@pytest.mark.parametrize("name", ["collapse", "verify", "image"])
def test_no_call_replaces_the_filters_of_warnings(work, name, monkeypatch):
    """``catch_warnings`` replaces them for all threads, and two that overlap restore the wrong ones."""
    callers = []

    class Recorded(warnings.catch_warnings):
        def __init__(self, *args, **options):
            callers.append(sys._getframe(1).f_globals["__name__"])
            super().__init__(*args, **options)

    monkeypatch.setattr(warnings, "catch_warnings", Recorded)
    work[name]()
    assert not [caller for caller in callers if caller.startswith("repvgg")]


def test_threads_leave_all_as_it_was(work):
    torch.manual_seed(7)
    filters, state = list(warnings.filters), torch.get_rng_state()
    safe, threads = list(torch.serialization.get_safe_globals()), torch.get_num_threads()
    start = threading.Barrier(THREADS)

    def run(index):
        start.wait()
        for _ in range(3):
            for call in list(work.values())[index % len(work) :] + list(work.values())[: index % len(work)]:
                call()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(run, range(THREADS)))
    assert list(warnings.filters) == filters
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.serialization.get_safe_globals() == safe
    assert torch.get_num_threads() == threads
