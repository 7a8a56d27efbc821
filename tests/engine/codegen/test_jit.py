"""Detection of the instruction set, and register allocation of the compiled kernels."""

import platform
import re
import sys

import llvmlite.binding
import pytest

from repvgg.engine.codegen import jit
from repvgg.engine.codegen.ir_builder import build_module
from repvgg.engine.codegen.jit import GENERIC_ISAS, SCALAR_ISA, compile_to_assembly, host_isa
from repvgg.engine.executable import kernel_functions
from repvgg.engine.graph import ConvGeometry, chain
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.plan import plan
from repvgg.engine.runtime import thread_pool
from repvgg.errors import UsageError
from tests.engine.helpers import random_conv

_FMA = ("vfmadd", "fmla", "mulps")
_LABEL = re.compile(r"^(\.?L?BB[\w.]+):")


def inner_loops(text: str) -> list[str]:
    """Return the basic blocks of an assembly that jump back to their own beginning."""
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        found = _LABEL.match(line)
        if found:
            blocks.append((found[1], []))
        blocks[-1][1].append(line)
    jump = re.compile(r"^\s+(j\w+|b\.\w+|cbn?z|tbn?z|b)\s.*?(\.?L?BB[\w.]+)\s*(?:[#/].*)?$")
    return [
        "\n".join(lines)
        for label, lines in blocks
        if any((found := jump.match(line)) and found[2] == label for line in lines)
    ]


@pytest.mark.parametrize("size", [20, pytest.param(56, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GENERIC_ISAS)
def test_inner_loops_do_not_spill(name, size):
    """No inner loop with FMAs: direct, stride 2, 1x1, groups, Winograd. Nothing is run, so any processor will do."""
    isa = GENERIC_ISAS[name]
    geometries = [
        ConvGeometry((3, 3), padding=(1, 1)),
        ConvGeometry((3, 3), (2, 2), (1, 1)),
        ConvGeometry((3, 3), padding=(1, 1), groups=2),
        ConvGeometry((1, 1)),
    ]
    layers = [random_conv(3 if at == 0 else 96, 96, one) for at, one in enumerate([geometries[1], *geometries])]
    planned = plan(chain(layers, 3), [(2, 3, size, size)], Target(isa))
    text = compile_to_assembly(build_module(kernel_functions(planned)[1]), isa)
    products = [loop for loop in inner_loops(text) if any(word in loop for word in _FMA)]
    assert len(products) >= len(geometries)
    for loop in products:
        assert "Spill" not in loop, loop
        assert "Reload" not in loop, loop


def test_inner_loops_finds_a_spill():
    text = ".LBB0_1:\n\tvmovups %zmm1, (%rsp) # 64-byte Spill\n\tjne\t.LBB0_1\n.LBB0_2:\n\tjmp\t.LBB0_1\n"
    (loop,) = inner_loops(text)
    assert "Spill" in loop
    (loop,) = inner_loops(".LBB7_3:                 // =>Inner\n\tfmla\tv0.4s, v1.4s, v2.4s\n\tb.ne\t.LBB7_3\n")
    assert "fmla" in loop


@pytest.mark.parametrize(
    ("triple", "features", "name"),
    [
        ("x86_64-unknown-linux-gnu", {*jit._AVX512, "avx2", "fma"}, "avx512"),
        ("x86_64-unknown-linux-gnu", {"avx512f", "avx2", "fma"}, "avx2"),
        ("x86_64-apple-darwin", {"avx2"}, "sse2"),
        ("arm64-apple-darwin", set(), "neon"),
        ("aarch64-unknown-linux-gnu", set(), "neon"),
        ("riscv64-unknown-linux-gnu", set(), "scalar"),
    ],
)
def test_host_isa(monkeypatch, triple, features, name):
    class Features(dict):
        def flatten(self):
            return "+some"

    monkeypatch.setattr(llvmlite.binding, "get_default_triple", lambda: triple)
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: Features.fromkeys(features, True))
    found = host_isa()
    wanted = GENERIC_ISAS.get(name, SCALAR_ISA)
    assert (found.name, found.width, found.registers) == (name, wanted.width, wanted.registers)
    assert found.features == "+some"


def test_other_systems_are_rejected(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match="runs on Linux and macOS, not on win32: use PyTorch"):
        host_isa()


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_single_threaded_ir_without_a_futex(monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert not thread_pool.has_workers()
    text = compile_to_assembly(thread_pool.thread_pool_ir(GENERIC_ISAS["neon"]), GENERIC_ISAS["neon"])
    assert "syscall" not in text
    assert "futex" not in text
