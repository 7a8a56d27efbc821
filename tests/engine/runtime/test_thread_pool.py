import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import repvgg.engine
from repvgg.engine.codegen.jit import GENERIC_ISAS, compile_to_assembly
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.runtime import thread_pool
from repvgg.engine.runtime.thread_pool import thread_count
from repvgg.errors import FallbackWarning, UsageError
from tests.engine.helpers import isas
from tests.engine.runtime import generate_thread_pool
from tests.engine.runtime.generate_thread_pool import CLANG, FOLDER, SOURCE
from tests.engine.test_compiled_model import SPECS, assert_equal, plain

pytestmark = pytest.mark.skipif(not thread_pool.has_workers(), reason="no worker threads on this platform")


def worker_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "repvgg-engine"]


@pytest.mark.parametrize("threads", [3])
@pytest.mark.parametrize("name", SPECS)
def test_results_do_not_depend_on_scheduling(name, threads):
    """The same bits, whichever thread computes a unit. Another number of threads may select other kernels."""
    model = plain(SPECS[name])
    fast = CompiledModel(read(model), [(3, 3, 37, 29)], isas()[-1], threads)
    for batch in (3, 1, 2):
        x = torch.randn(batch, 3, 37, 29)
        first = fast(x)
        for _ in range(20):
            torch.testing.assert_close(fast(x), first, rtol=0, atol=0)
        assert_equal(fast, model, x)


def test_many_calls_with_and_without_pauses():
    """Workers that sleep, poll or are late must not claim units of another call."""
    model = plain()
    fast = repvgg.engine.compile(model, (2, 3, 32, 32), threads=3)
    inputs = [torch.randn(1 + at % 2, 3, 32, 32) for at in range(8)]
    reference = [fast(x) for x in inputs]
    for call in range(400):
        if call % 50 == 0:
            time.sleep(0.002)
        torch.testing.assert_close(fast(inputs[call % 8]), reference[call % 8], rtol=0, atol=0)


def test_workers_end_with_the_model():
    before = len(worker_threads())
    fast = repvgg.engine.compile(plain(), (1, 3, 32, 32), threads=3)
    fast(torch.zeros(1, 3, 32, 32))
    assert len(worker_threads()) == before + 2
    del fast
    assert len(worker_threads()) == before


def test_idle_workers_sleep():
    fast = repvgg.engine.compile(plain(), (1, 3, 32, 32), threads=3)
    fast(torch.zeros(1, 3, 32, 32))
    deadline = time.monotonic() + 100
    used = math.inf
    while used >= 0.1:  # on a busy machine, workers take long to poll as often as they do before they sleep
        assert time.monotonic() < deadline, f"idle workers used {used} s of 0.2 s"
        before = time.process_time()
        time.sleep(0.2)
        used = time.process_time() - before  # two threads that poll would use 0.4 s


def test_thread_count():
    assert thread_count(3) == 3
    assert thread_count(None) == min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    with pytest.raises(UsageError, match="at least one thread"):
        thread_count(0)


def test_thread_count_is_bounded_by_pytorch_and_the_affinity_mask(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5})
    for number, reference in ((2, 2), (8, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        assert thread_count(None) == reference


def test_thread_count_follows_omp_num_threads():
    run = [sys.executable, "-c", "import repvgg.engine.runtime.thread_pool as pool; print(pool.thread_count(None))"]
    outcome = subprocess.run(
        run, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert outcome.stdout == "1\n", outcome.stderr


def test_one_thread_and_a_warning_without_workers(monkeypatch):
    monkeypatch.setattr(thread_pool, "has_workers", lambda: False)
    with pytest.warns(FallbackWarning, match="running on one thread instead of 3"):
        assert thread_count(3) == 1
    assert thread_count(1) == 1


@pytest.mark.parametrize("name", GENERIC_ISAS)
def test_the_ir_compiles_for_every_instruction_set(name):
    assert "sched_yield" in compile_to_assembly(thread_pool.thread_pool_ir(GENERIC_ISAS[name]), GENERIC_ISAS[name])


def test_workers_have_large_stacks():
    """Winograd tiles are on the stack: a process with small stacks must not crash; a new one, in case it does."""
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
    subprocess.run([sys.executable, "-c", text], check=True, timeout=250)


# The C source and the IR generated from it


def compile_c(folder: Path) -> ctypes.CDLL:
    """Compile thread_pool.c to a shared library with the C compiler of this machine."""
    compiler = next(filter(shutil.which, ("cc", "clang", "gcc", CLANG)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    library = folder / "thread_pool.so"
    flags = ["-std=c11", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE)], check=True)
    return ctypes.CDLL(str(library))


class LibraryCode:
    """Functions of a shared library, as a stand-in for MachineCode."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def address(self, name: str) -> int:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value


@pytest.fixture(params=["IR", "C"])
def pool_code(request, tmp_path, monkeypatch):
    """Run the pool from the checked-in IR, or from its C source."""
    if request.param == "C":
        code = LibraryCode(compile_c(tmp_path))
        monkeypatch.setattr(thread_pool, "_compile", lambda isa: code)


KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)

FIELDS = ("units_per_block", "items_per_block", "items_per_image", "first_image", "max_images")
SCHEDULE = [(1, 1, 1, 0, 7), (3, 2, 1, 0, 7), (200, 1, 1, 0, 2), (5, 4, 9, 0, 7), (4, 1, 1, 2, 2), (1, 8, 1, 5, 2)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_unit_is_computed_once_and_steps_in_order(pool_code, threads):
    """The same schedules by IR and by C code: blocks, chunks of a batch, several threads, two tables in turn."""
    log = []  # appending is atomic

    def kernel_of(number):
        return KERNEL(lambda source, *rest: log.append((number, source, *rest[-3:])))

    kernels = [kernel_of(number) for number in range(len(SCHEDULE))]
    tables = [thread_pool.step_table(len(SCHEDULE)) for _ in range(2)]
    for table in tables:
        for number, (row, entry) in enumerate(zip(table, SCHEDULE, strict=False)):
            row["function"] = ctypes.cast(kernels[number], ctypes.c_void_p).value
            row["source"] = 64 * (number + 1)
            for name, value in zip(FIELDS, entry, strict=True):
                row[name] = value
    pool = thread_pool.ThreadPool(isas()[-1], threads)
    for call in range(30):
        table, batch = tables[call % 2], (7, 1, 3)[call % 3]
        log.clear()
        pool.run(table.ctypes.data, len(SCHEDULE), batch)
        order = [number for number, *_ in log]
        assert order == sorted(order)
        for number, (units, items, items_per_image, first, most) in enumerate(SCHEDULE):
            images = min(max(batch - first, 0), most)
            blocks = -(-images * items_per_image // items)
            mine = [entry[1:] for entry in log if entry[0] == number]
            assert all(source == 64 * (number + 1) and count == blocks for source, count, _, _ in mine)
            covered = sorted(unit for _, _, begin, end in mine for unit in range(begin, end))
            assert covered == list(range(units * blocks))
    pool.quiesce()


def test_layouts_are_those_of_the_c_structures():
    """thread_pool.h asserts the same lines against offsetof and sizeof when it is compiled."""
    text = SOURCE.with_suffix(".h").read_text()
    lines = re.findall(r"^OFFSET\((\w+), (\w+), (\d+)\);", text, re.MULTILINE)
    found = {(name, field): int(offset) for name, field, offset in lines}
    sizes = {name: int(size) for name, size in re.findall(r"sizeof\(struct (\w+)\) == (\d+)", text)}
    for name, layout in (("step", thread_pool.STEP), ("thread_pool", thread_pool.POOL)):
        offsets = {field: offset for (struct, field), offset in found.items() if struct == name}
        assert offsets.pop("worker_thread_ids", layout.itemsize) == layout.itemsize == sizes[name]
        assert offsets == {field: offset for field, (_, offset) in layout.fields.items()}
    assert f"MAX_CPUS = {thread_pool.MAX_CPUS}," in text


@pytest.mark.skipif(not generate_thread_pool.available(), reason=f"needs {CLANG}")
@pytest.mark.parametrize("name", generate_thread_pool.FLAGS)
def test_the_ir_is_generated_from_the_source(name):
    assert generate_thread_pool.generate(name) == (FOLDER / name).read_text(), "run `make thread-pool-ir`"


@pytest.mark.skipif(sys.platform != "linux", reason="numbers of Linux system calls")
def test_system_call_numbers(tmp_path):
    """Compare with the headers of this machine, if it has them."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip(f"no {header}")
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    assert f"SYS_FUTEX = {numbers['futex']}, SYS_GETTID = {numbers['gettid']}" in SOURCE.read_text()
    assert f"SYS_SCHED_SETAFFINITY = {numbers['sched_setaffinity']} " in SOURCE.read_text()
