"""Compiled models in graphs that PyTorch traces."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import repvgg.engine
from repvgg.deploy import export_onnx, export_program
from repvgg.engine import operator
from repvgg.errors import ExportError, UsageError

OPERATOR = torch.ops.repvgg.compiled_model.default


class Net(nn.Module):
    """A network whose body is compiled."""

    def __init__(self, body):
        super().__init__()
        self.first, self.body, self.last = nn.Conv2d(3, 4, 1), body, nn.Linear(5, 2)

    def forward(self, x):
        return {"logits": self.last(self.body(self.first(x)))}


@pytest.fixture(scope="module")
def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.fixture
def fast(body):
    return repvgg.engine.compile(body, (4, 4, 12, 12), 1)


@pytest.fixture
def net(fast):
    return Net(fast).eval().requires_grad_(False)


def images(count=2, size=(12, 12)):
    return torch.randn(count, 3, *size)


def operators(graph):
    return [node for node in graph.nodes if node.target is OPERATOR]


def assert_same(traced, net, *shapes):
    """Assert that both compute the same, bit for bit: the engine runs in both."""
    for shape in shapes:
        x = images(*shape)
        torch.testing.assert_close(traced(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_number_and_size_of_images(net, strict):
    axes = {0: Dim("batch"), 2: Dim("height", min=3), 3: Dim("width", min=3)}
    program = torch.export.export(net, (images(),), dynamic_shapes={"x": axes}, strict=strict)
    (node,) = operators(program.graph)
    batch, channels = node.meta["val"].shape
    assert (type(batch), channels, node.meta["val"].dtype) == (torch.SymInt, 5, torch.float32)
    assert_same(program.module(), net, (1,), (3,), (2, (9, 17)))
    assert_same(program.run_decompositions().module(), net, (3,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_in_one_graph(net, backend):
    torch.compiler.reset()
    assert_same(torch.compile(net, backend=backend, fullgraph=True, dynamic=True), net, (2,), (3,), (2, (9, 17)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_a_call_and_no_constant(fast, mode):
    x = torch.randn(2, 4, 12, 12)
    graph = make_fx(fast, tracing_mode=mode)(x)
    assert len(operators(graph.graph)) == 1
    torch.testing.assert_close(graph(2 * x), fast(2 * x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # of torch.jit
def test_torch_jit_trace(net):
    traced = torch.jit.trace(net, images(), strict=False)
    assert_same(traced, net, (2,), (5,))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [([nn.Conv2d(4, 6, 3, stride=2)], (0, 4, 12, 13)), ([nn.Conv2d(4, 6, 3, padding=2), nn.ReLU()], (3, 4, 5, 1))],
)
def test_fake_outputs_have_the_shape_of_real_ones(layers, shape):
    fast = repvgg.engine.compile(nn.Sequential(*layers).eval(), (1, 4, 12, 12), 1)
    real = fast(torch.zeros(shape))
    with FakeTensorMode():
        fake = fast(torch.empty(shape))
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert fake.is_contiguous()
    assert real.is_contiguous()


def test_the_rules_of_operators(fast):
    """PyTorch's own checks: schema, no aliases, fake outputs, and dispatch."""
    torch.library.opcheck(OPERATOR, (torch.randn(2, 4, 12, 12), fast._name))


def test_a_graph_outlives_the_model_that_was_traced(body, net):
    x = images()
    wanted = net(x)
    other = Net(repvgg.engine.compile(body, (4, 4, 12, 12), 1)).eval()
    other.load_state_dict(net.state_dict())
    program = torch.export.export(other, (x,)).module()
    del other
    gc.collect()
    torch.testing.assert_close(program(x), wanted, rtol=0, atol=0)


def test_a_copy_has_a_name_of_its_own(fast):
    copied = copy.deepcopy(fast)
    assert copied._name != fast._name
    x = torch.randn(1, 4, 12, 12)
    torch.testing.assert_close(OPERATOR(x, copied._name), fast(x), rtol=0, atol=0)


def test_a_saved_graph_is_refused_in_another_process(net, tmp_path, monkeypatch):
    torch.export.save(torch.export.export(net, (images(),)), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    monkeypatch.setattr(operator, "_models", {})
    with pytest.raises(UsageError, match="a model that another process compiled: compile it in this process"):
        program(images())


@pytest.mark.parametrize(("export", "suffix"), [(export_program, "pt2"), (export_onnx, "onnx")])
def test_files_for_other_processes_are_refused(net, tmp_path, export, suffix):
    with pytest.raises(ExportError, match=r"calls a model of repvgg\.engine.*export the network that was compiled"):
        export(net, tmp_path / f"net.{suffix}", (3, 12, 12))
    assert list(tmp_path.iterdir()) == []


def test_what_the_model_does_not_take_is_refused_while_tracing(fast):
    wrong = [torch.zeros(1, 3, 12, 12), torch.zeros(1, 4, 12, 12).double(), torch.zeros(1, 4, 12, 12, device="meta")]
    for x, words in zip(wrong, ["shape", "float64", "meta"], strict=True):
        with pytest.raises(UsageError, match=f"This model takes .*{words}"):
            make_fx(fast, tracing_mode="symbolic")(x)


def test_gradients_are_refused(net):
    torch.compiler.reset()
    compiled = torch.compile(net.requires_grad_(True), backend="aot_eager")
    with pytest.raises(Exception, match=r"The engine computes no gradients: call the model under torch\.no_grad\(\)"):
        compiled(images())["logits"].sum().backward()


TRANSFORMS = {
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.torch.jit")  # of PyTorch's own code
def test_transforms_of_torch_func_are_refused_while_tracing(fast, name):
    transformed, x = TRANSFORMS[name](fast), torch.randn(2, 4, 12, 12)
    with pytest.raises(UsageError, match="call the model outside of them"):
        make_fx(transformed)(x)
    torch.compiler.reset()
    with pytest.raises(Exception, match="call the model outside of them"):
        torch.compile(transformed, backend="aot_eager")(x)
