"""Through the real torch.compile."""

import inspect
import os
import pathlib
import subprocess
import sys
import threading
import tomllib
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import repvgg
from repvgg.engine import torch_backend
from repvgg.engine.runtime import thread_pool
from repvgg.engine.torch_backend import repvgg_backend
from repvgg.errors import FallbackWarning
from tests.engine.test_compiled_model import SPECS, plain
from tests.engine.test_partition import Attention

GROUP = "torch_dynamo_backends"
PROJECT = pathlib.Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiled(monkeypatch):
    """The input shapes of all models that the engine compiles."""
    shapes, real = [], torch_backend.CompiledModel

    def noted(graph, input_shapes, *more):
        shapes.extend(input_shapes)
        return real(graph, input_shapes, *more)

    monkeypatch.setattr(torch_backend, "CompiledModel", noted)
    return shapes


def compiled_by_engine(model: nn.Module, **more) -> nn.Module:
    return torch.compile(model, backend=repvgg_backend, **more)


def assert_same(fast, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        wanted = model(x)
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mode"), [("plain", torch.no_grad), *((name, torch.inference_mode) for name in SPECS)]
)
def test_plain_architectures_run_in_the_engine(compiled, name, mode):
    model = plain(SPECS[name])
    with mode():
        assert_same(compiled_by_engine(model), model, torch.randn(2, 3, 37, 29))
    assert compiled == [(2, 3, 37, 29)]


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_other_batches(compiled, dynamic):
    model = plain()
    fast = compiled_by_engine(model, dynamic=dynamic)
    with torch.inference_mode():
        for batch in (2, 4, 3, 1):
            assert_same(fast, model, torch.randn(batch, 3, 32, 32))
    assert len(compiled) == {None: 3, True: 2, False: 4}[dynamic]  # PyTorch's graphs: batch 1 always has one of its own


def test_options(compiled):
    model, x = plain(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert_same(compiled_by_engine(model, options={"threads": 2}), model, x)
        assert [thread.name for thread in threading.enumerate()].count("repvgg-engine") >= thread_pool.has_workers()
        for options, words in (
            ({"thread": 2}, "only option of the engine is 'threads'"),
            ({"threads": 0}, "at least one thread"),
        ):
            torch.compiler.reset()
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words):
                compiled_by_engine(model, options=options)(x)


def test_changed_weights_are_read_again(compiled):
    model = plain()
    fast, x = compiled_by_engine(model), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert_same(fast, model, x)
        assert_same(fast, model, x)
    with torch.no_grad():
        model.head.bias.add_(1)
    with torch.inference_mode():
        assert_same(fast, model, x)
    model.load_state_dict(plain().state_dict())
    with torch.inference_mode():
        assert_same(fast, model, x)
    assert len(compiled) == 3


class Tuple(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x),)


def test_weights_that_the_graph_holds(compiled):
    model, x = plain(), torch.randn(2, 3, 32, 32)
    run = repvgg_backend(torch.fx.symbolic_trace(Tuple(model)), [x])
    with torch.inference_mode():
        assert_same(lambda x: run(x)[0], model, x)
    with torch.no_grad():
        model.head.bias.add_(1)
        assert_same(lambda x: run(x)[0], model, x)
    assert len(compiled) == 2


class Twice(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)

    def forward(self, x):
        return x + super().forward(x)


class Scaled(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        self.scale = nn.Parameter(torch.rand(1, 3, 1, 1))

    def forward(self, x):
        return self.scale * super().forward(self.scale + x)


class Pair(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 3, 1)

    def forward(self, x):
        x = super().forward(x)
        return x, x.relu()


REFUSED = {
    "gradients": (plain(), {}, "computes no gradients: call the model under torch.inference_mode"),
    "a hard shrinkage": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink()).eval(), {}, "hardshrink"),
    "float64": (nn.Sequential(nn.Conv2d(3, 4, 3)).double(), {"dtype": torch.float64}, "float32"),
}


@pytest.mark.parametrize("model", [Twice(), Pair(), Scaled()], ids=["a residual", "two outputs", "weights first"])
def test_graphs_with_branches(compiled, model):
    x = torch.randn(2, 3, 9, 8)
    with torch.inference_mode():
        assert_same(compiled_by_engine(model), model, x)
    assert compiled == [(2, 3, 9, 8)]


@pytest.mark.parametrize("name", REFUSED)
def test_pytorch_runs_the_rest_with_one_warning_that_gives_the_reason(compiled, name):
    model, kinds, words = REFUSED[name]
    x = torch.randn(1, 3, 32, 32, **kinds)
    inference = torch.inference_mode(name != "gradients")
    fast = compiled_by_engine(model)
    with inference, pytest.warns(FallbackWarning, match=words):
        assert_same(fast, model, x)
    with inference, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(fast, model, x)
    assert compiled == []


def test_parts_of_a_graph_run_in_the_engine(monkeypatch):
    """A warning says what runs where; other numbers of images and changed weights are taken into account."""
    parts, real = [], torch_backend.compile_part

    def noted(graph, shapes, **more):
        parts.append(shapes)
        return real(graph, shapes, **more)

    monkeypatch.setattr(torch_backend, "compile_part", noted)
    model, x = Attention().eval(), torch.randn(3, 3, 12, 10)
    fast = compiled_by_engine(model, dynamic=True)
    with torch.inference_mode():
        words = r"PyTorch runs parts of this graph(?s:.*)engine: .*\n.*PyTorch: scaled_dot_product_attention"
        with pytest.warns(FallbackWarning, match=words):
            assert_same(lambda x: fast(x)["logits"], lambda x: model(x)["logits"], x)
        assert len(parts) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch makes another graph for some numbers of images
            for count in (3, 5, 2):
                given = torch.randn(count, 3, 12, 10)
                assert_same(lambda x: fast(x)["tokens"], lambda x: model(x)["tokens"], given)
    with torch.no_grad():
        model.stem.weight.mul_(2)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(lambda x: fast(x)["logits"], lambda x: model(x)["logits"], x)


def test_gradients_are_right_and_inference_stays_in_the_engine(compiled):
    model, x = plain(), torch.randn(1, 3, 32, 32)
    fast = compiled_by_engine(model)
    with torch.inference_mode():
        fast(x)
    with pytest.warns(FallbackWarning, match="gradients"):
        fast(x).sum().backward()
    assert model.head.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert_same(fast, model, x)
    assert len(compiled) == 1


def test_no_gradients_are_needed_where_nothing_requires_them(compiled):
    model, x = plain().requires_grad_(False), torch.randn(2, 3, 32, 32)
    fast = compiled_by_engine(model)
    assert torch.is_grad_enabled()
    assert_same(fast, model, x)
    assert_same(fast, model, x[:0])
    assert compiled == [(2, 3, 32, 32), (1, 3, 32, 32)]
    with pytest.warns(FallbackWarning, match="computes no gradients"):
        fast(x.requires_grad_()).sum().backward()
    assert x.grad.any()


class Nested(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("wrap", [lambda model: model, Nested])
def test_the_warning_points_to_the_line_of_the_call(wrap):
    fast, x = compiled_by_engine(wrap(plain())), torch.randn(1, 3, 32, 32)
    with pytest.warns(FallbackWarning, match="gradients") as caught:
        fast(x)
    line = inspect.currentframe().f_lineno - 1
    assert [(one.filename, one.lineno) for one in caught] == [(__file__, line)]


def test_images_without_memory_are_left_to_pytorch(compiled):
    model = plain()
    run = repvgg_backend(torch.fx.symbolic_trace(Tuple(model)), [])
    x = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.randn(1, 3, 32, 32))
    with torch.inference_mode(), pytest.warns(FallbackWarning, match="memory"):
        assert run(x)[0].shape == (1, 10)


def test_autocast(compiled):
    model, x = plain(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), pytest.warns(FallbackWarning, match="autocast"):
        assert compiled_by_engine(model)(x).dtype == torch.bfloat16
    assert compiled == []


def test_the_entry_point_loads_the_backend():
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["entry-points"][GROUP]
    assert list(declared) == ["repvgg"]
    assert EntryPoint("repvgg", declared["repvgg"], GROUP).load() is repvgg_backend


@pytest.mark.slow
def test_by_name_without_an_import(tmp_path):
    """PyTorch finds the entry point of an installed package."""
    declared = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["entry-points"][GROUP]["repvgg"]
    about = tmp_path / "as_installed-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: as-installed\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[{GROUP}]\nrepvgg = {declared}\n")
    code = (
        "import sys, torch\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()\n"
        "fast = torch.compile(model, backend='repvgg')\n"
        "with torch.inference_mode():\n"
        "    torch.testing.assert_close(fast(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))\n"
        "print('repvgg.engine.compiled_model' in sys.modules)\n"
    )
    source = str(pathlib.Path(repvgg.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:repvgg", "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
