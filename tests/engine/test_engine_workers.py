import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from engine_helpers import isas
from test_engine_network import ROWS, assert_equal, plain

import repvgg.engine
from repvgg.engine import program
from repvgg.engine.isa import GENERIC
from repvgg.engine.jit import assembly
from repvgg.engine.network import Network
from repvgg.engine.reader import read
from repvgg.engine.workers import thread_count
from repvgg.errors import UsageError

pytestmark = pytest.mark.skipif(not program.has_workers(), reason="the engine has threads of its own on Linux alone")


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "repvgg-engine"]


@pytest.mark.parametrize("threads", [3])
@pytest.mark.parametrize("name", ROWS)
def test_threads_compute_the_same(name, threads):
    model = plain(ROWS[name])
    alone = Network(read(model), (3, 3, 37, 29), isas()[-1])
    together = Network(read(model), (3, 3, 37, 29), isas()[-1], threads)
    for batch in (3, 1, 2):
        x = torch.randn(batch, 3, 37, 29)
        torch.testing.assert_close(together(x), alone(x), rtol=0, atol=0)
    assert_equal(together, model, x)


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


def test_a_process_ends_while_threads_sleep_or_look():
    code = (
        "import torch, repvgg.engine, repvgg\n"
        "net = repvgg.create_model('repvgg_t0', plain=True)\n"
        "fast = repvgg.engine.compile(net, (1, 3, 32, 32), threads=3)\n"
        "print(tuple(fast(torch.zeros(1, 3, 32, 32)).shape))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "(1, 1000)\n", "")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_works_alone():
    network = repvgg.engine.compile(plain(), (1, 3, 32, 32), threads=2)
    x = torch.randn(1, 3, 32, 32)
    wanted = network(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if (network(x) == wanted).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_thread_counts():
    assert thread_count(3) == 3
    assert thread_count(None) == min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    with pytest.raises(UsageError, match="at least one thread"):
        thread_count(0)


@pytest.mark.parametrize("name", GENERIC)
def test_the_runtime_compiles_for_every_processor(name):
    assert "sched_yield" in assembly(program.runtime(GENERIC[name]), GENERIC[name])
