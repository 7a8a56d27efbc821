"""The compiled model in use: inputs, other sizes, copies, threads, forks, process exit, and the fallback to PyTorch."""

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import repvgg.engine
from repvgg.engine import compiled_model
from repvgg.engine.codegen.jit import GENERIC_ISAS, host_isa
from repvgg.engine.compiled_model import MAX_INPUT_SIZES, CompiledModel
from repvgg.engine.runtime import thread_pool
from repvgg.engine.runtime.memory import Arena
from repvgg.errors import FallbackWarning, MissingDependencyError, UnsupportedError, UsageError
from tests.engine.test_compiled_model import SPECS, assert_equal, plain

threaded = pytest.mark.skipif(not thread_pool.has_workers(), reason="no worker threads on this platform")
forking = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def model():
    return plain(SPECS["plain"])


@pytest.fixture
def fast(model):
    return repvgg.engine.compile(model, (2, 3, 32, 32))


def batch(count: int = 2, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randn(count, 3, *size)


# Arrays

ARRAYS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "negative strides": lambda x: x[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1],
    "every second": lambda x: np.repeat(x, 2, axis=3)[:, :, :, ::2],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "unaligned": lambda x: np.frombuffer(b"0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_any_layout(fast, name):
    x = ARRAYS[name](batch().numpy())
    x.flags.writeable = False
    out = fast(x)
    assert type(out) is np.ndarray
    assert out.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(out), fast(torch.from_numpy(x.copy())), rtol=0, atol=0)


def test_tensors_with_the_negative_bit(fast):
    numbers = torch.complex(batch(), batch())
    x = numbers.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(fast(x), fast(-numbers.imag), rtol=0, atol=0)


def without_storage(bytes_left: int, first_row: int = 0) -> torch.Tensor:
    x = batch(2, (32 + first_row, 32))
    view = x[:, :, first_row:]
    x.untyped_storage().resize_(bytes_left)  # as FSDP does with what it has sharded
    return view


def masked() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.masked.masked_tensor(batch(), batch() > 0)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([*batch()], layout=layout)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(batch(), 0.1, 0, torch.quint8)


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("the engine calls no function on it")


WITHOUT_MEMORY = {
    "fake": (lambda: FakeTensorMode().from_tensor(batch()), "FakeTensor"),
    "freed": (lambda: without_storage(0), "has 0 bytes of storage: its memory was freed"),
    "too short": (lambda: without_storage(64), "has 64 bytes of storage"),
    "a view beyond the end": (lambda: without_storage(4 * 2 * 3 * 34 * 32 - 4, 2), "26,108 bytes of storage"),
    "zeros of autograd": (lambda: torch._efficientzerotensor((2, 3, 32, 32)), "torch.zeros_like"),
    "functional": (lambda: torch._to_functional_tensor(batch()), "functionalize"),
    "masked": (masked, "a MaskedTensor"),
    "a wrapper": (lambda: Wrapper(batch()), "a Wrapper"),
    "nested": (lambda: nested(torch.strided), "several tensors"),
    "nested, jagged": (lambda: nested(torch.jagged), "several tensors"),
    "sparse": (lambda: batch().to_sparse(), "sparse"),
    "of oneDNN": (lambda: batch().to_mkldnn(), "float32 images"),
    "quantized": (quantized, "quint8"),
    "a masked array": (lambda: np.ma.masked_array(batch().numpy(), batch().numpy() > 0), "float32 images"),
}


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_images_without_memory_of_their_own_are_refused(fast, name):
    make, words = WITHOUT_MEMORY[name]
    with pytest.raises(UsageError, match=words):
        fast(make())
    assert fast(batch()).shape == (2, 10)


@forking
@pytest.mark.parametrize("name", ["fake", "freed", "too short", "zeros of autograd"])
def test_images_without_memory_do_not_end_the_process(fast, name):
    """In a child, which a read of such memory would kill."""
    child = os.fork()
    if child == 0:
        try:
            fast(WITHOUT_MEMORY[name][0]())
        except UsageError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


TRANSFORMS = {
    "vmap": lambda fast: torch.func.vmap(fast)(torch.stack([batch(), batch()])),
    "grad": lambda fast: torch.func.grad(lambda x: fast(x).sum())(batch()),
    "jvp": lambda fast: torch.func.jvp(fast, (batch(),), (batch(),)),
    "functionalize": lambda fast: torch.func.functionalize(fast)(batch()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of PyTorch's own code
def test_transforms_of_torch_func_are_refused(fast, name):
    with pytest.raises(UsageError, match="call the model outside of"):
        TRANSFORMS[name](fast)


class Named(torch.Tensor):
    """A subclass with memory of its own, as torchvision's images are."""


def test_subclasses_and_views_with_memory_are_read_in_place(fast):
    x = torch.randn(5, 3, 40, 40)[1:3, :, 4:36, 8:]
    wanted = fast(x.contiguous())
    for same in (x.as_subclass(Named), torch.nn.Parameter(x), x.contiguous().requires_grad_()):
        torch.testing.assert_close(fast(same).as_subclass(torch.Tensor), wanted, rtol=0, atol=0)


def test_outputs_of_one_pixel_are_not_overwritten_by_the_next_call():
    """The buffer then has the layout of the output already, but must be copied nevertheless."""
    network = repvgg.engine.compile(torch.nn.Sequential(torch.nn.Conv2d(16, 16, 1)), (1, 16, 1, 1))
    first = network(torch.zeros(1, 16, 1, 1))
    copied = first.clone()
    network(torch.ones(1, 16, 1, 1))
    torch.testing.assert_close(first, copied, rtol=0, atol=0)


# Other sizes


def sizes_of(compiled: CompiledModel) -> list[tuple[int, ...]]:
    return [(one.batch, *one.shapes[0][2:]) for one in compiled._executables]


def test_other_sizes_are_compiled_on_first_use(fast, model):
    for count, size in [(3, (32, 32)), (1, (40, 33)), (2, (32, 32)), (1, (40, 33)), (1, (32, 32))]:
        assert_equal(fast, model, batch(count, size))
    assert sizes_of(fast) == [(3, 32, 32), (1, 40, 33), (2, 32, 32)]
    assert fast.input_shape == (2, 3, 32, 32)


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=threaded)])
def test_the_least_recently_used_size_is_dropped(model, threads):
    fast = repvgg.engine.compile(model, (2, 3, 32, 32), threads=threads)
    others = [(20 + at, 20) for at in range(MAX_INPUT_SIZES)]
    first = weakref.ref(fast._executables[0])
    for size in others:
        assert_equal(fast, model, batch(1, size))
    assert sizes_of(fast) == [(1, *size) for size in others]
    gc.collect()
    assert first() is None
    assert_equal(fast, model, batch())


def test_sizes_share_equal_packed_weights(model):
    fast = repvgg.engine.compile(model, (1, 3, 32, 32))
    before = {values.ctypes.data for values in fast._executables[0]._weights}
    fast(batch(2, (64, 32)))
    both = before & {values.ctypes.data for values in fast._executables[1]._weights}
    assert len(both) > len(before) / 2
    assert_equal(fast, model, batch(1))
    assert_equal(fast, model, batch(2, (64, 32)))


def test_images_that_are_too_small_leave_the_model_usable():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5)).eval()
    fast = repvgg.engine.compile(model, (1, 3, 8, 8))
    with pytest.raises(UnsupportedError, match="'0' has no output for feature maps of 4x8: pass larger images"):
        fast(batch(1, (4, 8)))
    assert_equal(fast, model, batch(1, (8, 8)))


def test_a_profile_of_another_size(fast):
    steps = fast.profile(batch(1, (48, 48)), repeats=1)
    assert sum(step.num_multiplies for step in steps) > sum(
        step.num_multiplies for step in fast.profile(batch(1), repeats=1)
    )


@threaded
@pytest.mark.parametrize("precision", ["highest", pytest.param("high", marks=pytest.mark.slow)])
def test_threads_across_sizes_without_a_pause(precision):
    """A late worker must neither claim work of a table that ran before, nor read one that was freed.

    The highest precision has direct kernels only, which are compiled quickly.
    """
    model = plain(SPECS["plain"])  # the fewer layers, the more often the table changes
    fast = repvgg.engine.compile(model, (1, 3, 32, 32), threads=3, precision=precision)
    inputs = [batch(1 + at % 2, (20 + 4 * (at % (MAX_INPUT_SIZES + 1)), 24)) for at in range(10)]
    wanted = [repvgg.engine.compile(model, tuple(x.shape), threads=1, precision=precision)(x) for x in inputs]
    for call in range(300):
        at = call % 10 if call % 30 == 0 else call % 4
        torch.testing.assert_close(fast(inputs[at]), wanted[at], rtol=1e-5, atol=1e-5)


# Copies


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_compiled_again(fast, again):
    x, other = batch(), again(fast)
    torch.testing.assert_close(other(x), fast(x), rtol=0, atol=0)
    assert (other.input_shape, other.threads) == (fast.input_shape, fast.threads)
    assert repr(other) == repr(fast)


def test_a_pickle_is_compiled_for_the_processor_that_reads_it(model, fast, monkeypatch):
    text = pickle.dumps(fast)
    monkeypatch.setattr(compiled_model, "host_isa", lambda: GENERIC_ISAS["sse2"])
    if host_isa().name in ("sse2", "avx2", "avx512"):
        assert pickle.loads(text)._target.isa == GENERIC_ISAS["sse2"]


# Threads and forks


def test_a_concurrent_call_is_refused():
    """Calls until one is refused; those that are not are right."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, padding=1)).eval()
    fast, x = repvgg.engine.compile(model, (1, 3, 128, 128), threads=1), batch(1, (128, 128))
    wanted, messages, over = fast(x), [], threading.Event()

    def call() -> None:
        while not over.is_set():
            try:
                torch.testing.assert_close(fast(x), wanted, rtol=0, atol=0)
            except UsageError as error:
                messages.append(str(error))
                over.set()

    callers = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for caller in callers:
        caller.start()
    over.wait(200)
    over.set()
    for caller in callers:
        caller.join()
    assert messages
    assert set(messages) == {"This model is running in another thread: compile one model for each thread."}
    torch.testing.assert_close(fast(x), wanted, rtol=0, atol=0)


def tasks() -> int:
    """Count the threads of this process as the system does."""
    return len(os.listdir("/proc/self/task"))


@threaded
def test_threads_and_memory_are_returned_to_the_system():
    """With a model that takes far more memory than anything else that may come and go."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, padding=1)).eval()
    repvgg.engine.compile(model, (1, 3, 32, 32))(batch(1))
    before, held = tasks(), resident()
    fast = repvgg.engine.compile(model, (4, 3, 512, 512), threads=4)
    fast(batch(1, (512, 512)))
    assert tasks() == before + 3
    fast(batch(4, (512, 512)))
    assert resident() - held > 2**27
    del fast
    gc.collect()
    deadline = time.monotonic() + 100
    while tasks() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # the system lists a thread for a moment after it was joined
    assert tasks() == before
    assert resident() - held < 2**26


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@threaded
@forking
@pytest.mark.parametrize("threads", [1, 3])
def test_a_forked_child_starts_its_own_threads(model, threads):
    fast = repvgg.engine.compile(model, (2, 3, 32, 32), threads=threads)
    x = batch()
    wanted = fast(x)
    fast(batch(1, (24, 24)))
    child = os.fork()
    if child == 0:
        right = all((fast(x) == wanted).all() for _ in range(20))
        fast(batch(1, (24, 24)))
        fast(batch(1, (28, 28)))
        alone = sum(thread.name == "repvgg-engine" for thread in threading.enumerate()) == threads - 1
        os._exit(0 if right and alone else 1)
    torch.testing.assert_close(fast(x), wanted, rtol=0, atol=0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@forking
def test_a_forked_child_writes_to_its_own_memory():
    """Nothing that it computes appears in the buffers of its parent."""
    numbers = Arena().zeros(2**20)
    child = os.fork()
    if child == 0:
        numbers[:] = 1
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not numbers.any()


@threaded
@forking
def test_a_call_in_the_parent_does_not_block_a_forked_child(model):
    fast = repvgg.engine.compile(model, (2, 3, 32, 32), threads=2)
    with fast._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if fast(batch()).shape == (2, 10) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@threaded
@forking
def test_in_forked_worker_processes(model):
    """They exit normally while the model is alive."""
    fast = repvgg.engine.compile(model, (1, 3, 32, 32), threads=2)
    inputs = [batch(1) for _ in range(4)]
    wanted = [fast(x).numpy() for x in inputs]
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def work(at: int) -> None:
        results.put((at, fast(inputs[at].numpy())))

    children = [context.Process(target=work, args=(at,)) for at in range(4)]
    for child in children:
        child.start()
    found = dict(results.get(timeout=200) for _ in children)
    for child in children:
        child.join(200)
    assert [child.exitcode for child in children] == [0] * 4
    for at, out in enumerate(wanted):
        np.testing.assert_array_equal(found[at], out)


EXITS = {
    "in a global": "",
    "in a running thread": (  # on arrays: PyTorch aborts when the exit interrupts one of its own calls
        "import threading\ndef again():\n    while True:\n        fast(x)\n"
        "threading.Thread(target=again, daemon=True).start()\n"
    ),
}


@pytest.mark.parametrize("name", EXITS)
def test_a_process_exits_while_the_model_is_alive(name):
    code = (
        "import torch, repvgg.engine\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))\n"
        "x = torch.zeros(1, 3, 32, 32).numpy()\n"
        "fast = repvgg.engine.compile(net, (1, 3, 32, 32), threads=3)\n"
        "fast(x)\n"
    ) + EXITS[name]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert (run.returncode, run.stderr) == (0, "")


# The fallback to PyTorch


def test_fallback_runs_an_unsupported_model():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Hardshrink()).train()
    with pytest.raises(UnsupportedError):
        repvgg.engine.compile(model, (1, 3, 8, 8))
    with pytest.warns(FallbackWarning, match=r"PyTorch runs Sequential.*'1' \(Hardshrink\)"):
        slow = repvgg.engine.compile(model, (1, 3, 8, 8), fallback=True)
    x = batch(2, (8, 8))
    out = slow(x)
    assert model.training
    assert not out.requires_grad
    np.testing.assert_array_equal(slow(x.numpy()), out.numpy())
    torch.testing.assert_close(out, model.eval()(x), rtol=0, atol=0, check_stride=False)
    with pytest.raises(UsageError, match=r"got torch\.float64"):
        slow(x.double())


@pytest.mark.parametrize(
    "error", [RuntimeError("LLVM does not know this.\nmore"), MissingDependencyError("No llvmlite.")]
)
def test_fallback_after_a_failed_compilation(model, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(compiled_model, "CompiledModel", fail)
    with pytest.raises(type(error)):
        repvgg.engine.compile(model, (1, 3, 32, 32))
    with pytest.warns(FallbackWarning, match=r"LLVM does not know this\.$|No llvmlite\.$"):
        slow = repvgg.engine.compile(model, (1, 3, 32, 32), fallback=True)
    assert slow.model is model


def test_a_missing_package_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    with pytest.raises(MissingDependencyError, match=r"needs 'llvmlite'.*pip install 'repvgg\[engine\]'"):
        repvgg.engine.compile(model, (1, 3, 32, 32))


def test_invalid_arguments_raise_with_a_fallback_too(model):
    with pytest.raises(UsageError, match="4 positive integers"):
        repvgg.engine.compile(model, (1, 32, 32), fallback=True)
    with pytest.raises(UsageError, match="at least one thread"):
        repvgg.engine.compile(model, (1, 3, 32, 32), threads=0, fallback=True)


def test_no_warning_without_a_fallback(model):
    assert isinstance(repvgg.engine.compile(model, (1, 3, 32, 32), fallback=True), CompiledModel)
