import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import repvgg.engine
from repvgg.engine.codegen.jit import GENERIC, assembly
from repvgg.engine.network import Network
from repvgg.engine.reader import read
from repvgg.engine.runtime import thread_pool
from repvgg.engine.runtime.thread_pool import thread_count
from repvgg.errors import FallbackWarning, UsageError
from tests.engine.helpers import isas
from tests.engine.test_network import ROWS, assert_equal, plain

pytestmark = pytest.mark.skipif(
    not thread_pool.has_workers(), reason="the engine has threads of its own on Linux alone"
)


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "repvgg-engine"]


@pytest.mark.parametrize("threads", [3])
@pytest.mark.parametrize("name", ROWS)
def test_threads_compute_the_same_bits_each_time(name, threads):
    """Whoever took which unit; another number of threads may have other kernels, and rounds otherwise."""
    model = plain(ROWS[name])
    network = Network(read(model), (3, 3, 37, 29), isas()[-1], threads)
    for batch in (3, 1, 2):
        x = torch.randn(batch, 3, 37, 29)
        first = network(x)
        for _ in range(20):
            torch.testing.assert_close(network(x), first, rtol=0, atol=0)
        assert_equal(network, model, x)


def test_many_calls_with_and_without_a_rest():
    """Threads that sleep, look around or are late must take nothing of another call."""
    model = plain()
    network = repvgg.engine.compile(model, (2, 3, 32, 32), threads=3)
    inputs = [torch.randn(1 + at % 2, 3, 32, 32) for at in range(8)]
    wanted = [network(x) for x in inputs]
    for call in range(400):
        if call % 50 == 0:
            time.sleep(0.002)
        torch.testing.assert_close(network(inputs[call % 8]), wanted[call % 8], rtol=0, atol=0)


def test_threads_end_with_the_network():
    before = len(helpers())
    network = repvgg.engine.compile(plain(), (1, 3, 32, 32), threads=3)
    network(torch.zeros(1, 3, 32, 32))
    assert len(helpers()) == before + 2
    del network
    assert len(helpers()) == before


def test_idle_threads_use_no_time():
    network = repvgg.engine.compile(plain(), (1, 3, 32, 32), threads=3)
    network(torch.zeros(1, 3, 32, 32))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1  # two threads that look around would use 0.4 s


def test_thread_counts():
    assert thread_count(3) == 3
    assert thread_count(None) == min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    with pytest.raises(UsageError, match="at least one thread"):
        thread_count(0)


def test_pytorchs_number_and_the_processors_bound_it(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    for number, wanted in ((2, 2), (8, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert thread_count(None) == wanted


def test_openmps_number_is_heard():
    run = [sys.executable, "-c", "import repvgg.engine.runtime.thread_pool as w; print(w.thread_count(None))"]
    said = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert said.stdout == "1\n", said.stderr


def test_one_thread_and_a_warning_where_there_are_none(monkeypatch):
    monkeypatch.setattr(thread_pool, "has_workers", lambda: False)
    with pytest.warns(FallbackWarning, match="one thread computes, not 3"):
        assert thread_count(3) == 1
    assert thread_count(1) == 1


@pytest.mark.parametrize("name", GENERIC)
def test_the_runtime_compiles_for_every_processor(name):
    assert "sched_yield" in assembly(thread_pool.thread_pool_ir(GENERIC[name]), GENERIC[name])


def test_workers_have_stacks_of_their_own_size():
    """Large tiles lie on the stack: a process with small ones must not die. In one of its own, as it would."""
    text = (
        "import threading, torch, repvgg.engine\n"
        "from torch import nn\n"
        "threading.stack_size(2**18)\n"
        "model = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()).eval()\n"
        "x = torch.randn(1, 96, 28, 28)\n"
        "fast = repvgg.engine.compile(model, x.shape, threads=3)\n"
        "for _ in range(50): y = fast(x)\n"
        "torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=1e-5)\n"
        "assert threading.stack_size() == 2**18\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=120)
