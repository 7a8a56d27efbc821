"""Export to a C library: the comparison before it is kept, the files, the example, other processors."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import repvgg.engine
from repvgg.deploy import c_comparison, c_library
from repvgg.deploy.c_library import export_c
from repvgg.deploy.loading import target_of
from repvgg.engine.library import build
from repvgg.engine.library.targets import CPU_TARGETS, cpu_target
from repvgg.errors import EquivalenceError, ExportError, OutputExistsError, UnsupportedError, UsageError
from tests.rounding import UNIT_ROUNDOFF

SHAPE = (3, 9, 7)
NATIVE = cpu_target("native")
needs_linker = pytest.mark.skipif(build.find_linker(NATIVE) is None, reason="no linker")
needs_compiler = pytest.mark.skipif(NATIVE.compiler is None, reason="no C compiler")


class Net(nn.Module):
    """Two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        maps = self.conv(x).relu()
        return {"maps": maps, "logits": self.head(maps.mean((2, 3)))}


def close(found, wanted):
    # Sums of 27 products: 64 roundings of the largest value, as `repvgg.verify` allows.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=64 * UNIT_ROUNDOFF * wanted.abs().max().item())


def expected(x):
    with torch.no_grad():
        return Net().double().eval()(x.double())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "net"
    model = Net().eval()
    real = torch.rand(3, *SHAPE)
    return export_c(
        model, model, folder, [SHAPE], max_batch=2, threads=2, name="net", images=[real], notes={"source": "a test"}
    )


@needs_linker
def test_writes_a_library_that_was_compared(exported):
    names = ["CMakeLists.txt", "README.md", "example.c", "libnet.a", "libnet.so", "net.h", "net.json"]
    assert sorted(one.name for one in exported.path.iterdir()) == names
    assert exported.evidence.passed
    assert exported.evidence.samples == 2 + 1 + 3  # the largest batch, one image, and the real ones
    assert exported.ran == "libnet.so was loaded and run on this machine."
    readme = (exported.path / "README.md").read_text()
    for text in (
        "output 0: float32 (N, 16, 9, 7)",
        "output 1: float32 (N, 5)",
        "Up to 2 images",
        "64 float32 roundings",
    ):
        assert text in readme
    x = torch.randn(2, *SHAPE)
    maps, logits = repvgg.engine.load(exported.path)(x)
    close(maps, expected(x)["maps"])
    close(logits, expected(x)["logits"])


@needs_linker
def test_a_runner_names_outputs_and_keeps_notes(exported, tmp_path):
    shutil.copytree(exported.path, tmp_path / "net")
    for path in (tmp_path / "net", tmp_path / "net" / "libnet.so"):
        assert target_of(path) == "c"
        runner = c_library.load(path, 1)
        x = torch.randn(5, *SHAPE)
        found = runner(x)
        close(found["output0"], expected(x)["maps"])
        close(found["output1"], expected(x)["logits"])
        assert (runner.input_shape, runner.outputs) == ((None, *SHAPE), ("output0", "output1"))
        assert (runner.dtype, runner.threads, runner.notes) == (torch.float32, 1, {"source": "a test"})


@needs_linker
def test_a_runner_refuses_broken_files(exported, tmp_path):
    with pytest.raises(ExportError, match="export it with"):
        c_library.load(tmp_path / "missing")
    assert target_of(tmp_path) is None
    shutil.copytree(exported.path, tmp_path / "net")
    (tmp_path / "net" / "net.json").write_text("[]")
    with pytest.raises(ExportError, match="export it again"):
        c_library.load(tmp_path / "net")
    (tmp_path / "net" / "libnet.so").unlink()  # not written in place: it is loaded
    (tmp_path / "net" / "libnet.so").write_bytes(b"no library")
    with pytest.raises(ExportError, match="cannot be loaded"):
        c_library.load(tmp_path / "net")
    with pytest.raises(UsageError, match="at least 1"):
        c_library.load(exported.path, 0)


@needs_linker
@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_cmake_builds_the_example(exported, tmp_path):
    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    run("cmake", "-S", str(exported.path), "-B", str(tmp_path / "build"))
    run("cmake", "--build", str(tmp_path / "build"))
    assert "output 1:" in run(str(tmp_path / "build" / "example"))


@needs_linker
@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_cmake_takes_the_folder_into_a_project(exported, tmp_path):
    lists = f"""
        cmake_minimum_required(VERSION 3.13)
        project(program C)
        add_subdirectory({exported.path} net)
        add_executable(program main.c)
        target_link_libraries(program PRIVATE net)
    """
    (tmp_path / "CMakeLists.txt").write_text(lists)
    main = '#include "net.h"\n#include <stdio.h>\nint main(void) { printf("%d", net_num_outputs()); return 0; }\n'
    (tmp_path / "main.c").write_text(main)
    for command in (["cmake", "-S", ".", "-B", "build"], ["cmake", "--build", "build"]):
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    found = subprocess.run([tmp_path / "build" / "program"], capture_output=True, text=True, check=True)
    assert found.stdout == "2"


@needs_compiler
@pytest.mark.parametrize("linked", ["static", "shared"])
def test_the_example_is_compiled_and_run(exported, tmp_path, linked):
    folder = exported.path
    command = [NATIVE.compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I", str(folder)]
    library = [str(folder / "libnet.a")] if linked == "static" else [f"-L{folder}", "-lnet", f"-Wl,-rpath,{folder}"]
    program = tmp_path / "example"
    subprocess.run([*command, "-o", str(program), str(folder / "example.c"), *library, "-pthread"], check=True)
    x = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    (tmp_path / "in").write_bytes(x.tobytes())

    def run(*arguments):
        return subprocess.run([str(program), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("in", "out", "2", "1").returncode == 0
    found = np.fromfile(tmp_path / "out", np.float32)
    wanted = expected(torch.from_numpy(x))
    close(torch.from_numpy(found[: 2 * 16 * 63]).reshape(2, 16, 9, 7), wanted["maps"])
    close(torch.from_numpy(found[2 * 16 * 63 :]).reshape(2, 5), wanted["logits"])
    shown = run()
    assert shown.returncode == 0
    assert f"{NATIVE.name}, Net\n2 threads, first output after " in shown.stdout
    failures = {("in", "out", "3"): "wrong number of images", ("none", "out"): "cannot be opened"}
    failures |= {("in", "out", "1", "-2"): "number of threads"}
    for arguments, text in failures.items():
        failed = run(*arguments)
        assert failed.returncode == 1
        assert text in failed.stderr
    if linked == "static":
        needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
        assert all("libc." in line or "ld-linux" in line or "vdso" in line for line in needed.splitlines())


@needs_linker
@pytest.mark.parametrize("where", ["embedded", "file"])
def test_a_changed_weight_is_caught_and_nothing_is_left(tmp_path, monkeypatch, where):
    describe = build.describe_network

    def changed_network(*arguments, **options):
        data = describe(*arguments, **options)
        largest = max(range(len(data.weights)), key=lambda index: data.weights[index].nbytes)
        changed = bytearray(data.weights[largest])
        changed[len(changed) // 2 + 3] ^= 0x40  # the highest bit of the exponent of one float
        data.weights[largest] = memoryview(bytes(changed))
        return data

    monkeypatch.setattr(build, "describe_network", changed_network)
    model = Net().eval()
    with pytest.raises(EquivalenceError):
        export_c(model, model, tmp_path / "net", [SHAPE], weights=where)
    assert list(tmp_path.iterdir()) == []


def test_swapped_channels_are_caught(tmp_path):
    model, swapped = Net().eval(), Net().eval()
    with torch.no_grad():
        swapped.conv.weight[[0, 1]] = swapped.conv.weight[[1, 0]]
    with pytest.raises(EquivalenceError):
        export_c(model, swapped, tmp_path / "net", [SHAPE])
    assert list(tmp_path.iterdir()) == []


def test_without_a_linker_the_archive_is_compared_and_the_result_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_linker", lambda target: None)
    model = Net().eval()
    done = export_c(model, model, tmp_path / "net", [SHAPE])
    assert done.evidence.passed
    assert done.ran == "libmodel.a was loaded by LLVM and run on this machine."
    assert done.remarks[0].startswith("libmodel.so was not written: there is no linker for ")
    assert not (tmp_path / "net" / "libmodel.so").exists()
    assert (tmp_path / "net" / "libmodel.a").exists()


def test_a_foreign_library_is_compiled_and_said_not_to_have_run(tmp_path, monkeypatch):
    foreign = next(one for one in CPU_TARGETS.values() if not one.is_native)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = Net().eval()
    done = export_c(model, model, tmp_path / "net", [SHAPE], target=foreign.name)
    assert done.evidence is None
    assert done.ran.startswith("compiled, not run: qemu-")
    assert "**Not compared with the source:** compiled, not run" in (tmp_path / "net" / "README.md").read_text()


def test_folders_are_replaced_on_request_and_only_if_exported(tmp_path):
    model, folder = Net().eval(), tmp_path / "net"
    folder.mkdir()
    with pytest.raises(OutputExistsError, match="add --overwrite"):
        export_c(model, model, folder, [SHAPE])
    (folder / "precious").write_text("x")
    with pytest.raises(OutputExistsError, match="other files than an export"):
        export_c(model, model, folder, [SHAPE], overwrite=True)
    assert [one.name for one in tmp_path.rglob("*")] == ["net", "precious"]
    (folder / "libmodel.a").write_text("of an earlier export")
    export_c(model, model, folder, [SHAPE], overwrite=True)
    assert (folder / "model.h").exists()
    assert not (folder / "precious").exists()


def test_refuses_bad_arguments(tmp_path):
    model = Net().eval()
    for options, text in {
        "target": ({"target": "x86-64-v5"}, "did you mean"),
        "batch": ({"max_batch": 0}, "at least one image"),
        "threads": ({"threads": 0}, "at least one thread"),
        "weights": ({"weights": "outside"}, "'embedded' or in a 'file'"),
        "name": ({"name": "a-b"}, "no C identifier"),
        "precision": ({"precision": "low"}, "precision must be one of"),
    }.values():
        with pytest.raises(UsageError, match=text):
            export_c(model, model, tmp_path / "net", [SHAPE], **options)
    with pytest.raises(UnsupportedError, match="cumsum"):
        export_c(Cumulative(), Cumulative(), tmp_path / "net", [SHAPE])
    assert list(tmp_path.iterdir()) == []


class Cumulative(nn.Module):
    def forward(self, x):
        return x.cumsum(2)


@pytest.mark.slow
@needs_compiler
def test_two_networks_in_one_program(tmp_path):
    """Their functions have their names, and nothing else of them is visible."""
    model = Net().eval()
    for name in ("one", "two"):
        export_c(model, model, tmp_path / name, [SHAPE], name=name)
    source = tmp_path / "main.c"
    source.write_text(
        '#include "one.h"\n#include "two.h"\n'
        "int main(void) { one *a; two *b; return one_create(0, 1, &a) || two_create(0, 2, &b) || "
        "one_threads(a) != 1 || two_threads(b) != 2 || one_output_size(1) != 5; }\n"
    )
    folders = [tmp_path / name for name in ("one", "two")]
    libraries = [f"{folder}/lib{folder.name}.a" for folder in folders]
    command = [NATIVE.compiler, "-Wall", "-Wextra", "-Werror", *(f"-I{folder}" for folder in folders), str(source)]
    subprocess.run([*command, *libraries, "-pthread", "-o", str(tmp_path / "main")], check=True)
    assert subprocess.run([str(tmp_path / "main")], check=False).returncode == 0


# Other processors


def emulated(name):
    target = CPU_TARGETS[name]
    if target.is_native:
        return pytest.mark.skipif(False, reason="")
    missing = target.emulator is None or target.compiler is None
    return pytest.mark.skipif(missing, reason=f"needs qemu-{target.architecture} and its cross compiler")


@pytest.mark.slow
@emulated("aarch64")
@pytest.mark.parametrize("where", ["embedded", "file"])
def test_aarch64_runs_in_an_emulator(tmp_path, where):
    model = Net().eval()
    done = export_c(model, model, tmp_path / "net", [SHAPE], target="aarch64", max_batch=3, weights=where)
    assert done.evidence.passed
    assert done.evidence.samples == 4


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64")
@pytest.mark.parametrize(
    ("target", "cpu", "runs"),
    [
        ("x86-64-v2", "Nehalem", True),
        ("x86-64-v2", "core2duo", False),
        ("x86-64-v3", "Haswell", True),
        ("x86-64-v3", "Nehalem", False),
        ("x86-64-v4", "Haswell", False),
    ],
)
def test_processors_without_the_instructions_are_refused(tmp_path, target, cpu, runs):
    """In an emulator of older processors: the library says what is missing rather than crash."""
    if not CPU_TARGETS[target].is_native:
        pytest.skip("another architecture")
    model = Net().eval()
    done = export_c(model, model, tmp_path / "net", [SHAPE], target=target)
    built = build.BuiltLibrary("model", done.target, tmp_path / "net" / "libmodel.a", None, None, 0)
    program = c_comparison.compile_example(built, tmp_path)
    outcome = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, str(program)], capture_output=True, text=True, check=False, timeout=200
    )
    assert outcome.returncode == (0 if runs else 1), outcome.stderr
    assert ("output 0:" in outcome.stdout) == runs
    assert ("This processor lacks instructions of " + target in outcome.stderr) != runs


class ChannelsFirst(Net):
    def forward(self, x):
        return self.conv(x).relu().transpose(0, 1)


class OneNumber(Net):
    def forward(self, x):
        return self.conv(x).mean((1, 2, 3))


@needs_linker
def test_an_output_may_be_one_number(tmp_path):
    model = OneNumber().eval()
    done = export_c(model, model, tmp_path / "net", [SHAPE], max_batch=2, threads=1, name="net")
    images = torch.randn(3, *SHAPE)  # more than two at once
    with torch.no_grad():
        wanted = model.double()(images.double())
    assert done.evidence.passed
    close(repvgg.engine.load(tmp_path / "net")(images), wanted)
    assert "- output 0: float32 (N)" in (tmp_path / "net" / "README.md").read_text()


def test_the_first_axis_of_outputs_counts_the_images(tmp_path):
    model = ChannelsFirst().eval()
    with pytest.raises(UnsupportedError):
        export_c(model, model, tmp_path / "net", [SHAPE], max_batch=2, threads=1, name="net")
    assert not (tmp_path / "net").exists()
