import ast
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repvgg.verify import border_inputs, comparison, isolated_eval, verify
from repvgg.verify.comparison import FLOORS, UNIT_ROUNDOFF, tolerance_for
from repvgg.verify.execution import full_float32
from tests.verify.models import folded, net

IMAGES = border_inputs((2, 3, 8, 8), batches=1)

get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
NODES = [("generic", "all")] + [(b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]
INHERITED = "none"


def snapshot():
    """Return all observable precision flags: the tree, which nodes inherit from the root, and the old API."""
    tree = [get(*node) for node in NODES]
    root = tree[0]
    inherited = []
    for probe in ("ieee", "tf32"):
        put("generic", "all", probe)
        inherited.append([get(*node) for node in NODES])
    put("generic", "all", root)
    return tree, inherited, *(value_or_raises(read) for read in OLD_API)


OLD_API = (
    torch.get_float32_matmul_precision,
    lambda: torch.backends.cuda.matmul.allow_tf32,
    lambda: torch.backends.cudnn.allow_tf32,
)


def value_or_raises(read):
    try:
        return read()
    except RuntimeError:
        return "raises"


def old_and_new_disagree():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.matmul.fp32_precision = "ieee"


STATES = {
    "default": lambda: None,
    "old high": lambda: torch.set_float32_matmul_precision("high"),
    "old medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "new matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new root": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "root ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "root bf16": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
    "cuda": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "mkldnn": lambda: put("mkldnn", "all", "bf16"),
    "mkldnn conv": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
    "mixed": old_and_new_disagree,
    "leaf under root": lambda: (put("generic", "all", "tf32"), put("mkldnn", "matmul", "ieee")),
}


@pytest.fixture
def flags():
    """Check that the flags are as in a new process before the test, and restore them."""
    before = snapshot()
    yield
    torch.set_float32_matmul_precision("highest")
    for node in NODES:
        if node not in (("cuda", "conv"), ("cuda", "rnn")):  # never written: their default cannot be restored
            put(*node, INHERITED)
    assert snapshot() == before


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize("state", STATES)
def test_full_float32_inside_and_restored_flags_afterwards(state):
    STATES[state]()
    before = snapshot()
    with full_float32():
        assert {get(*node) for node in NODES} == {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert snapshot() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert snapshot() == before


@pytest.mark.usefixtures("flags")
def test_of_two_threads_the_last_one_restores_the_flags():
    torch.backends.fp32_precision = "tf32"
    before = snapshot()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with full_float32():
            inside.set()
            leave.wait(10)
            seen.append({get(*node) for node in NODES})

    seen = []
    thread = threading.Thread(target=other)
    with full_float32():
        thread.start()
        assert inside.wait(10)
    assert get("cuda", "matmul") == "ieee", "the other thread is inside"
    leave.set()
    thread.join()
    assert seen == [{"ieee"}]
    assert snapshot() == before


@pytest.mark.usefixtures("flags")
def test_snapshot_distinguishes_the_states():
    seen = []
    for change in STATES.values():
        change()
        seen.append(snapshot())
        torch.set_float32_matmul_precision("highest")
        for node in NODES:
            if node not in (("cuda", "conv"), ("cuda", "rnn")):
                put(*node, INHERITED)
    assert all(seen.count(one) == 1 for one in seen)


@pytest.mark.usefixtures("flags")
def test_verify_runs_in_full_precision():
    """The flag "medium" makes oneDNN multiply in bfloat16 on CPUs that support it."""
    torch.set_float32_matmul_precision("medium")
    seen = []

    def candidate(x: Tensor) -> Tensor:
        seen.append(get("mkldnn", "matmul"))
        return x

    verify(lambda x: x, candidate, IMAGES)
    assert seen == ["ieee"]
    assert get("mkldnn", "matmul") == "bf16"


def modes(model):
    return [module.training for module in model.modules()]


def mixed_modes(model):
    model.train()
    model.second.eval()
    return model


def test_modes_gradients_and_random_states_are_restored():
    model = mixed_modes(net())
    candidate = mixed_modes(folded(model))
    before, state = (modes(model), modes(candidate)), torch.get_rng_state()

    def noisy(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not any(modes(candidate))
        return candidate(x) + 0.0 * torch.rand_like(x[:, :1, 0, 0])

    assert verify(model, candidate, IMAGES).passed
    with isolated_eval(candidate):
        noisy(IMAGES[0])
    assert (modes(model), modes(candidate)) == before
    assert torch.is_grad_enabled()
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_state_is_restored_after_an_error():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(3)
            raise ZeroDivisionError

    model, candidate = mixed_modes(net()), Failing()
    before, state = modes(model), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        verify(model, candidate, IMAGES)
    assert modes(model) == before
    assert candidate.training
    assert float(candidate.calls) == 0.0
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
    assert torch.is_grad_enabled()


def test_parameters_and_buffers_are_unchanged():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x.detach().mean((1, 2, 3))
            return x * self.weight

    model, candidate = net(), Counting()
    for reference in (model, candidate):
        identities = [id(tensor) for tensor in (*reference.parameters(), *reference.buffers())]
        found = {name: value.clone() for name, value in reference.state_dict().items()}
        verify(reference, candidate, IMAGES)
        torch.testing.assert_close(reference.state_dict(), found, rtol=0, atol=0)
        assert [id(tensor) for tensor in (*reference.parameters(), *reference.buffers())] == identities
    assert float(candidate.calls) == 0.0
    assert candidate.last.shape == (1,)


def test_autocast_is_disabled():
    model = net()
    plain = verify(model, folded(model), IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = verify(model, folded(model), IMAGES)
        assert torch.is_autocast_enabled("cpu")
    assert under.passed
    assert under.relative == plain.relative


def test_module_that_refuses_eval():
    class Exported(nn.Conv2d):
        def train(self, mode: bool = True) -> nn.Module:
            raise NotImplementedError("Calling train() is not supported yet.")

    model = Exported(3, 2, 3)
    assert verify(model, model, IMAGES).passed
    assert model.training


def test_verify_inside_inference_mode():
    model = net()
    with torch.inference_mode():
        assert verify(model, folded(model), IMAGES).passed


def test_tolerances_are_at_least_the_floors():
    assert FLOORS[torch.float64] == pytest.approx(1e-12)
    for dtype, unit in UNIT_ROUNDOFF.items():
        assert torch.finfo(dtype).eps == 2 * unit
        assert tolerance_for(dtype, 0.0)[0] == FLOORS[dtype] < 0.04
        assert tolerance_for(dtype, float("inf"))[0] == FLOORS[dtype]
    assert tolerance_for(torch.float32, 1e-3) == (4e-3, tolerance_for(torch.float32, 1e-3)[1])
    assert "4 x the reference's own error, 1.0e-03" in tolerance_for(torch.float32, 1e-3)[1]
    assert tolerance_for(torch.float64, 1.0)[0] == FLOORS[torch.float64]


def test_verify_imports_only_torch_numpy_and_the_standard_library():
    for path in sorted(Path(comparison.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                allowed = name.startswith(("repvgg.verify", "repvgg.algebra", "repvgg.errors", "repvgg._"))
                assert allowed or name.partition(".")[0] in {"torch", "numpy", *sys.stdlib_module_names}, (
                    f"{path.name}: {name}"
                )
