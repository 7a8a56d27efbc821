"""A library that was built ahead of time: its C interface, called directly, and ``repvgg.engine.load``."""

import ctypes
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg.engine
from repvgg.engine.codegen.jit import GENERIC_ISAS
from repvgg.engine.frontend import read
from repvgg.engine.library import description
from repvgg.engine.library.build import FUNCTIONS, RUNTIME, build_library, find_linker
from repvgg.engine.library.loaded import CompiledLibrary, load_archive
from repvgg.engine.library.object_file import read_archive
from repvgg.engine.library.targets import CPU_TARGETS, cpu_target
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.plan import plan
from repvgg.errors import UsageError
from tests.rounding import UNIT_ROUNDOFF

OK, BAD_ARGUMENT, BUSY, WRONG_WEIGHTS = 0, 1, 4, 5
SHAPES = [(3, 5, 11, 8), (3, 2, 5, 4)]
POINTER, FLOAT = ctypes.c_void_p, ctypes.POINTER(ctypes.c_float)

pytestmark = pytest.mark.skipif(find_linker(cpu_target("native")) is None, reason="no linker")


class TwoInputs(nn.Module):
    """A convolution by Winograd, a depthwise one, a residual sum, two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.depthwise = nn.Conv2d(5, 40, 3, padding=1), nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.block, self.head = nn.Conv2d(40, 40, 3, padding=1), nn.Linear(40, 7)

    def forward(self, x, y):
        x = self.stem(x).relu()
        x = x + self.block(self.depthwise(x)).relu()
        return self.head(x.mean((2, 3))), x[:, :2] * F.interpolate(y, (11, 8))


def build(folder, name="model", target="native", **options):
    cpu, model = cpu_target(target), TwoInputs().eval()
    prepared = plan(read(model, SHAPES), SHAPES, Target(cpu.isa, 2))
    return build_library(prepared, folder, cpu, name=name, version="test", threads=2, **options), model


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def library(built):
    return ctypes.CDLL(str(built[0].shared))


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape[1:], generator=generator) for shape in SHAPES]


def assert_close(found, model, inputs):
    with torch.no_grad():
        wanted = model.double()(*(x.double() for x in inputs))
    model.float()
    for one, other in zip(found, wanted, strict=True):
        # Sums of 360 products in three layers: 64 roundings of the largest value, as `repvgg.verify` allows.
        bound = 64 * UNIT_ROUNDOFF * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


def arrays(tensors):
    return (POINTER * len(tensors))(*(x.data_ptr() for x in tensors))


def created(library, threads=0, weights=None):
    handle = POINTER()
    library.model_last_error.restype, library.model_last_error.argtypes = ctypes.c_char_p, [POINTER]
    library.model_run.argtypes = [POINTER, ctypes.c_int64, POINTER, POINTER]
    library.model_destroy.argtypes = library.model_threads.argtypes = [POINTER]
    assert library.model_create(weights, threads, ctypes.byref(handle)) == OK
    return handle


# From Python


@pytest.mark.parametrize("threads", [1, 3])
def test_against_float64(built, threads):
    files, model = built
    network = repvgg.engine.load(files.shared, threads)
    assert (network.threads, network.max_images, network.version) == (threads, 3, "test")
    assert network.input_shapes == tuple(SHAPES)
    assert network.output_shapes == [(7,), (2, 11, 8)]
    for count in (3, 1, 2, 8):  # the last one in three parts
        inputs = images(count, seed=count)
        assert_close(network(*inputs), model, inputs)


def test_arrays_and_strides(built):
    files, model = built
    network = repvgg.engine.load(files.shared.parent)
    x, y = images(2)
    found = network(x.contiguous(memory_format=torch.channels_last).numpy(), y.numpy()[:, :, :, ::-1])
    assert all(isinstance(one, np.ndarray) for one in found)
    assert_close([torch.from_numpy(one) for one in found], model, [x, y.flip(3)])
    empty = network(x[:0], y[:0])
    assert [tuple(one.shape) for one in empty] == [(0, 7), (0, 2, 11, 8)]


def test_refuses_other_inputs(built):
    network = repvgg.engine.load(built[0].shared)
    x, y = images(2)
    with pytest.raises(UsageError, match="takes 2 inputs, got 1"):
        network(x)
    with pytest.raises(UsageError, match=r"exported for images of \(5, 11, 8\), got \(5, 10, 8\)"):
        network(x[:, :, 1:], y)
    with pytest.raises(UsageError, match="same number of images"):
        network(x, y[:1])
    with pytest.raises(UsageError, match="float32"):
        network(x.double(), y)
    with pytest.raises(UsageError, match="at least one thread"):
        repvgg.engine.load(built[0].shared, 0)


def test_refuses_other_files(tmp_path):
    with pytest.raises(UsageError, match="There is no file"):
        repvgg.engine.load(tmp_path / "libmodel.so")
    with pytest.raises(UsageError, match=r"has 0 files lib\*\.so"):
        repvgg.engine.load(tmp_path)
    (tmp_path / "libmodel.so").write_text("no library")
    with pytest.raises(UsageError, match="cannot be loaded on this machine"):
        repvgg.engine.load(tmp_path)


def test_the_archive_runs_without_a_linker(built):
    files, model = built
    inputs = images(3)
    assert_close(load_archive(files.archive)(*inputs), model, inputs)


def test_the_archive_has_the_format_of_ar(built):
    if shutil.which("nm") is None:
        pytest.skip("no binutils")
    files = built[0]
    names = subprocess.run(["nm", str(files.archive)], capture_output=True, text=True, check=True).stdout
    defined = set(re.findall(r" [TtRrDd] (\w+)$", names, re.MULTILINE))
    assert set(FUNCTIONS) <= defined
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(files.shared)], capture_output=True, text=True, check=True
    )
    # Nothing else is visible: two networks in one program do not meet.
    assert set(re.findall(r" T (\w+)", listed.stdout)) == set(FUNCTIONS)
    assert not re.findall(r" [DBR] (\w+)", listed.stdout)


def test_a_replaced_library_is_loaded_anew(tmp_path):
    """The loader of the system takes a path that it has seen for the same library."""
    loaded, x = [], torch.ones(1, 4, 2, 2)
    for number in (1, 2):
        model = nn.Conv2d(4, 4, 1)
        nn.init.constant_(model.weight, number)
        nn.init.zeros_(model.bias)
        folder = tmp_path / str(number)
        folder.mkdir()
        cpu = cpu_target("native")
        files = build_library(plan(read(model), [(1, 4, 2, 2)], Target(cpu.isa)), folder, cpu)
        os.replace(files.shared, tmp_path / "libmodel.so")
        loaded.append(repvgg.engine.load(tmp_path))
    assert [one(x)[0, 0, 0, 0].item() for one in loaded] == [4, 8]


# The C interface


def test_questions(library):
    shape = (ctypes.c_int64 * 8)()
    assert (library.model_num_inputs(), library.model_num_outputs()) == (2, 2)
    assert library.model_input_shape(1, shape) == 3
    assert shape[:3] == [2, 5, 4]
    assert library.model_output_shape(0, shape) == 1
    assert shape[0] == 7
    library.model_input_size.restype = library.model_output_size.restype = ctypes.c_int64
    assert (library.model_input_size(0), library.model_output_size(1)) == (5 * 11 * 8, 2 * 11 * 8)
    for number in (-1, 2):
        assert library.model_input_shape(number, shape) == library.model_output_shape(number, shape) == 0
        assert library.model_input_size(number) == library.model_output_size(number) == 0
    assert library.model_input_shape(0, None) == 0


def test_bad_arguments_are_errors(library):
    handle = created(library)
    x, y = images(4)
    found = [torch.full((4, 7), 5.0), torch.full((4, 2, 11, 8), 5.0)]
    inputs, outputs = arrays([x, y]), arrays(found)

    def refuses(handle, count, inputs, outputs, text):
        assert library.model_run(handle, count, inputs, outputs) == BAD_ARGUMENT
        assert re.search(text, library.model_last_error(handle).decode())

    refuses(handle, 4, inputs, outputs, "at most 3 images at once, got 4: export it with a larger --max-batch")
    refuses(handle, -1, inputs, outputs, "negative")
    refuses(handle, 2**62, inputs, outputs, "at most 3 images")
    refuses(handle, 1, None, outputs, "array of inputs")
    refuses(handle, 1, inputs, None, "array of outputs")
    refuses(handle, 1, (POINTER * 2)(x.data_ptr(), None), outputs, "An input is NULL")
    refuses(handle, 1, inputs, (POINTER * 2)(None, found[1].data_ptr()), "An output is NULL")
    refuses(handle, 1, (POINTER * 2)(x.data_ptr() + 1, y.data_ptr()), outputs, "aligned to 4 bytes")
    refuses(None, 1, inputs, outputs, "a handle that was created")
    assert all((one == 5).all() for one in found)
    assert library.model_run(handle, 0, inputs, outputs) == OK
    assert library.model_run(handle, 3, inputs, outputs) == OK
    assert library.model_last_error(handle) == b""
    assert [bool((one[3:] == 5).all()) for one in found] == [True, True]
    library.model_destroy(handle)
    library.model_destroy(None)
    assert library.model_threads(None) == 0
    assert library.model_create(None, 0, None) == BAD_ARGUMENT
    for threads in (-1, 513):
        place = POINTER(1)
        assert library.model_create(None, threads, ctypes.byref(place)) == BAD_ARGUMENT
        assert place.value is None
        assert b"number of threads" in library.model_last_error(None)


def test_handles_run_at_once_and_one_refuses_to(library, built):
    inputs = images(3)
    reference = [one.clone() for one in repvgg.engine.load(built[0].shared)(*inputs)]
    handles = [created(library, 2) for _ in range(2)]
    failures = []

    def work(handle):
        found = [torch.empty(3, 7), torch.empty(3, 2, 11, 8)]
        for _ in range(200):
            status = library.model_run(handle, 3, arrays(inputs), arrays(found))
            if status not in (OK, BUSY):
                failures.append(status)
            elif status == OK and not all(torch.equal(*pair) for pair in zip(found, reference, strict=True)):
                failures.append("other numbers")

    # Two threads for each of two handles: those of a handle get BUSY or the right numbers, never a mixture.
    threads = [threading.Thread(target=work, args=(handle,)) for handle in [*handles, *handles]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for handle in handles:
        library.model_destroy(handle)


def test_workers_end_with_the_handle(library):
    def count():
        return len(os.listdir("/proc/self/task"))

    before = count()
    handles = [created(library, 4), created(library, 1)]
    assert count() == before + 3
    for handle in handles:
        library.model_destroy(handle)
    assert count() == before


def test_a_forked_child_runs_alone(library):
    handle = created(library, 3)
    inputs = images(2)
    found = [torch.empty(2, 7), torch.empty(2, 2, 11, 8)]
    assert library.model_run(handle, 2, arrays(inputs), arrays(found)) == OK
    given, again = arrays(inputs), [torch.empty(2, 7), torch.empty(2, 2, 11, 8)]
    outputs = arrays(again)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        status = library.model_run(handle, 2, given, outputs)
        library.model_destroy(handle)
        os.write(writer, bytes([status]) + again[0].numpy().tobytes())
        os._exit(0)
    result = os.read(reader, 1 + 4 * 14)
    os.waitpid(child, 0)
    library.model_destroy(handle)
    assert result[0] == OK
    torch.testing.assert_close(torch.frombuffer(bytearray(result[1:]), dtype=torch.float32), found[0].ravel())


# Weights in a file


def test_weights_in_a_file(tmp_path):
    files, model = build(tmp_path, "wide", embed_weights=False)
    inputs = images(2)
    network = repvgg.engine.load(files.shared)
    assert_close(network(*inputs), model, inputs)
    content = bytearray(files.weights.read_bytes())
    assert files.archive.stat().st_size < files.weights_bytes < len(content)
    for damaged in (content[:-4], b"\1" + content[1:]):
        files.weights.write_bytes(damaged)
        with pytest.raises(UsageError, match="cannot be read, or is not that of this library"):
            repvgg.engine.load(files.shared)
    with pytest.raises(UsageError, match="cannot be read"):
        repvgg.engine.load(files.shared, weights=tmp_path / "other")
    files.weights.unlink()
    with pytest.raises(UsageError, match="Pass the path of the file of weights"):
        repvgg.engine.load(files.shared)


def test_embedded_weights_take_no_file(built):
    with pytest.raises(UsageError, match="contains its weights"):
        repvgg.engine.load(built[0].shared, weights="other")


# Targets


@pytest.mark.slow
@pytest.mark.parametrize("name", CPU_TARGETS)
def test_every_target_compiles(name, tmp_path):
    files, _ = build(tmp_path, target=name)
    machine = {"x86_64": 62, "aarch64": 183}[CPU_TARGETS[name].architecture]
    for member in read_archive(files.archive):
        assert member[:4] == b"\x7fELF"
        assert int.from_bytes(member[18:20], "little") == machine


def test_names_of_targets_and_libraries(tmp_path):
    with pytest.raises(UsageError, match="did you mean x86-64-v3"):
        cpu_target("x86-64-v33")
    with pytest.raises(UsageError, match="choose one of"):
        cpu_target("riscv")
    with pytest.raises(UsageError, match="'my-net' is no C identifier"):
        build(tmp_path, "my-net")


# The two sides of the interface


def test_the_structures_of_the_description_are_those_of_the_c_source():
    text = (RUNTIME / "library.c").read_text()
    header = (RUNTIME / "model.h").read_text()

    def fields(structure):
        body = re.search(rf"struct {structure} \{{(.*?)\n\}};", text, re.DOTALL)[1]
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
        names = [name for line in re.findall(r"(?:uint64_t|char|uint8_t) ([^;]+);", body) for name in line.split(", ")]
        return [(name.partition("[")[0], name.partition("[")[2].rstrip("]")) for name in names]

    sizes = {"": (), "3": (3,), "MODEL_MAX_RANK": (8,), "VERSION_BYTES": (128,), "ID_BYTES": (32,)}
    for structure, dtype in {
        "input": description.INPUT_TABLE,
        "output": description.OUTPUT_TABLE,
        "step_description": description.STEP_TABLE,
        "description": description.DESCRIPTION,
    }.items():
        assert [(name, sizes[size]) for name, size in fields(structure)] == [
            (name, dtype[name].shape) for name in dtype.names
        ]
    assert f"MODEL_MAX_RANK = {description.MAX_RANK}," in header
    assert f"WEIGHTS_HEADER = {description.WEIGHTS_HEADER}," in text
    assert f"VERSION_BYTES = {description.VERSION_BYTES}, ID_BYTES = {description.ID_BYTES}" in text


def test_every_function_of_the_header_is_exported():
    header = (RUNTIME / "model.h").read_text()
    declared = re.findall(r"^\S.*?\b(model_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL), re.MULTILINE)
    assert set(declared) == set(FUNCTIONS)


def test_the_header_compiles_as_c_and_cpp(tmp_path):
    source = tmp_path / "use.c"
    source.write_text('#include "model.h"\nint use(void) { return model_num_inputs(); }\n')
    languages = {"cc": ["-std=c11", "-xc"], "c++": ["-xc++"]}
    present = {compiler: flags for compiler, flags in languages.items() if shutil.which(compiler)}
    if not present:
        pytest.skip("no C compiler")
    for compiler, flags in present.items():
        command = [compiler, *flags, "-Wall", "-Wextra", "-pedantic", "-Werror", "-I", str(RUNTIME), "-fsyntax-only"]
        subprocess.run([*command, str(source)], check=True)


def test_the_generic_targets_have_the_width_of_their_instructions():
    assert {name: one.isa.width for name, one in CPU_TARGETS.items()} == {
        "x86-64-v4": GENERIC_ISAS["avx512"].width,
        "x86-64-v3": GENERIC_ISAS["avx2"].width,
        "x86-64-v2": GENERIC_ISAS["sse2"].width,
        "aarch64": GENERIC_ISAS["neon"].width,
    }


def test_a_library_is_described(built):
    network = repvgg.engine.load(built[0].shared, 1)
    assert isinstance(network, CompiledLibrary)
    assert repr(network) == "<CompiledLibrary test, 1 threads>"
