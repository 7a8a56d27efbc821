import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg import create_model
from repvgg.engine.frontend import read
from repvgg.engine.graph import ADD, RELU, AdaptivePool, Binary, C, Conv, ConvGeometry, Pointwise, Rearrangement
from repvgg.errors import UnsupportedError


class Net(nn.Module):
    """A function of one input, with modules to call by name."""

    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def ops(model: nn.Module, *shapes: tuple[int, int, int, int]) -> list:
    return [node.op for node in read(model, shapes or None).nodes]


def kinds(model: nn.Module) -> list[type]:
    return [type(op) for op in ops(model)]


def conv(inputs: int = 4, outputs: int = 4, kernel: int = 3, **more) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **more)


def test_a_plain_architecture_is_a_chain():
    graph = read(create_model("repvgg_t0", plain=True))
    found = [node.op for node in graph.nodes]
    assert [type(op) for op in found] == [Conv] * 7 + [AdaptivePool, Conv]
    assert [node.inputs for node in graph.nodes] == [(value,) for value in range(9)]
    assert [node.name for node in graph.nodes[:2]] == ["stem.conv", "stages.0.0.conv"]
    assert all(op.epilogue == RELU for op in found[:7])
    assert found[1].geometry == ConvGeometry((3, 3), (2, 2), (1, 1))
    assert found[1].weight.shape == (32, 16, 3, 3)
    assert [(output.value, output.axes) for output in graph.outputs] == [(9, ((C,),))]
    assert graph.sizes is None


@pytest.mark.parametrize(("name", "gate_has_relu"), [("repvgg_d2se", True), ("repvggplus_l2pse", False)])
def test_gates(name, gate_has_relu):
    with torch.device("meta"):
        model = create_model(name, plain=True)
    model.to_empty(device="cpu")
    found = ops(model)
    products = [op for op in found if isinstance(op, Binary)]
    assert len(products) == sum(isinstance(op, Conv) and op.geometry.kernel == (3, 3) for op in found)
    assert all(op.kind == "mul" and (op.epilogue == RELU) == gate_has_relu for op in products)
    hidden = [op.epilogue for op in found if isinstance(op, Conv) and op.geometry.kernel == (1, 1)]
    assert hidden[:2] == [RELU, (Pointwise("sigmoid"),)]


class Functional(nn.Module):
    """A model that holds its weights itself and calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6))
        self.matrix = nn.Parameter(torch.randn(5, 6))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, self.shift, stride=2, padding="valid", groups=2)
        x = F.dropout(torch.relu(x), 0.5, self.training)
        return F.linear(x.mean((2, 3)), self.matrix)


def test_functions_with_parameters_of_the_model():
    model = Functional()
    convolution, pool, linear = ops(model.train(), (1, 4, 9, 9))
    assert convolution.geometry == ConvGeometry((3, 3), (2, 2), groups=2)
    assert convolution.epilogue == RELU
    assert pool == AdaptivePool("avg", (1, 1))
    torch.testing.assert_close(torch.from_numpy(convolution.bias), model.shift.detach(), rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(linear.weight[:, :, 0, 0]), model.matrix.detach(), rtol=0, atol=0)
    assert not linear.bias.any()


def test_weights_are_copied_and_the_mode_is_restored():
    model = nn.Sequential(conv(bias=False), nn.Dropout(), nn.Identity()).train()
    (layer,) = ops(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert layer.weight.any()
    assert not layer.bias.any()
    assert model.training
    assert model[1].training


SPELLINGS = {
    "modules": lambda net, x: net.head(torch.flatten(net.pool(net.relu(net.conv(x))), 1)),
    "functions": lambda net, x: net.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(net.conv(x)), 1), 1)),
    "methods": lambda net, x: net.head(net.conv(x).relu().mean((2, 3))),
    "negative axes": lambda net, x: net.head(net.conv(x).relu().mean(dim=(-1, -2), keepdim=True).flatten(1)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_modules_functions_and_methods_read_alike(spelling):
    found = ops(
        Net(SPELLINGS[spelling], conv=conv(), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(4, 2))
    )
    assert [type(op) for op in found] == [Conv, AdaptivePool, Conv]
    assert found[0].epilogue == RELU


HEADS = {
    "view": lambda net, y: net.pool(y).view(y.size(0), -1),
    "view by channels": lambda net, y: net.pool(y).view(-1, y.shape[1]),
    "reshape": lambda net, y: net.pool(y).reshape(y.shape[0], -1),
    "view of unpacked sizes": lambda net, y: net.pool(y).view(*y.size()[:2]),
    "squeeze twice": lambda net, y: net.pool(y).squeeze(-1).squeeze(-1),
    "squeeze both": lambda net, y: torch.squeeze(net.pool(y), (2, 3)),
    "indices": lambda net, y: net.pool(y)[:, :, 0, 0],
    "ellipsis": lambda net, y: net.pool(y)[..., -1, 0],
    "in place": lambda net, y: torch.flatten(net.pool(F.relu_(y)), 1),
    "in place again": lambda net, y: (y.relu_(), torch.flatten(net.pool(y), 1))[1],
    "mean of lists": lambda net, y: y.mean([-1, -2]),
    "mean of pixels": lambda net, y: y.flatten(2).mean(-1),
    "mean of viewed pixels": lambda net, y: y.view(y.size(0), y.size(1), -1).mean(dim=2),
    "mean in float32": lambda net, y: y.mean((2, 3), dtype=torch.float32),
    "window of the map": lambda net, y: F.avg_pool2d(y, y.shape[2:]).flatten(1),
    "no-ops": lambda net, y: y.contiguous().to(y.device).float().mean((2, 3)).to(net.head.weight.dtype).clone(),
    "checked": lambda net, y: net.pool(y).flatten(1) if isinstance(y, torch.Tensor) and y.dim() == 4 else None,
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_any_spelling(name):
    head = HEADS[name]
    model = Net(
        lambda net, x: net.head(head(net, net.conv(x).relu())),
        conv=conv(),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Linear(4, 2),
    ).eval()
    convolution, pool, linear = ops(model)
    assert convolution.epilogue == RELU
    assert pool == AdaptivePool("avg", (1, 1))
    torch.testing.assert_close(torch.from_numpy(linear.weight[:, :, 0, 0]), model.head.weight.detach(), rtol=0, atol=0)
    for x in (torch.randn(1, 4, 6, 5), torch.randn(3, 4, 5, 6)):  # what PyTorch computes is that network
        with torch.no_grad():
            wanted = model.head(model.conv(x).relu().mean((2, 3)))
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


class SENet(nn.Module):
    """The gate of Hu et al.: linear layers between views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.fc = nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True), nn.Linear(2, 4), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        n, c, _, _ = x.size()
        scale = self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1)
        x *= scale
        return F.relu(x, True)


def test_gates_of_linear_layers():
    model = SENet().eval()
    graph = read(model)
    convolution, pool, down, up, product = (node.op for node in graph.nodes)
    assert convolution.epilogue == ()
    assert pool == AdaptivePool("avg", (1, 1))
    assert (down.epilogue, up.epilogue) == (RELU, (Pointwise("sigmoid"),))
    assert (product.kind, product.epilogue) == ("mul", RELU)
    assert graph.nodes[2].name == "fc.0"
    torch.testing.assert_close(torch.from_numpy(up.weight[:, :, 0, 0]), model.fc[2].weight.detach(), rtol=0, atol=0)


class Observer(nn.Module):
    """Its forward looks at what other threads would see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen, self.calls = conv(), [], 0

    def forward(self, x):
        self.calls += 1
        self.seen.append((nn.Module.__call__, nn.Module.__getattr__, F.relu))
        if (nn.Module.__call__, nn.Module.__getattr__, F.relu) != BEFORE:
            raise RuntimeError("patched")
        return self.conv(x)


BEFORE = nn.Module.__call__, nn.Module.__getattr__, F.relu


def test_nothing_is_patched_and_the_model_does_not_notice():
    model = Observer()
    assert kinds(model) == [Conv]
    assert (model.calls, model.seen) == (0, [])


def test_models_of_torch_compile_and_replaced_forwards():
    model = nn.Sequential(conv(), nn.ReLU())
    model[0].compile()
    (node,) = read(torch.compile(nn.Sequential(torch.compile(model)))).nodes
    assert node.op.epilogue == RELU
    assert node.name.endswith("0.0")
    model[1].forward = lambda x: x * 2
    assert ops(model)[0].epilogue == (Pointwise("affine", 2.0),)


def test_the_mode_of_a_submodule_in_a_list():
    model = Net(lambda net, x: net.parts[1](net.parts[0](x)), first=conv(), second=nn.Dropout()).train()
    model.parts = [model.first, model.second]
    assert kinds(model) == [Conv]


def test_threads_read_at_once_beside_a_model_that_runs():
    model, x, wrong, over = nn.Sequential(conv(), nn.ReLU()), torch.randn(1, 4, 5, 5), [], threading.Event()
    with torch.no_grad():
        wanted = model(x)

    def run() -> None:
        with torch.no_grad():
            while not over.is_set():
                if not torch.equal(model(x), wanted):
                    wrong.append("other")

    def compile_in_turn(seed: int) -> None:
        layers = [conv(bias=bool(seed % 2)) for _ in range(8)]
        for _ in range(2):
            found = ops(nn.Sequential(*layers))
            pairs = zip(found, layers, strict=True)
            wrong.extend(seed for one, each in pairs if (one.weight != each.weight.detach().numpy()).any())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(7) as pool:
            other = pool.submit(run)
            for each in [pool.submit(compile_in_turn, seed) for seed in range(6)]:
                each.result(100)
            over.set()
            other.result(100)
    finally:
        over.set()
        sys.setswitchinterval(interval)
    assert not wrong
    assert (nn.Module.__call__, nn.Module.__getattr__, F.relu) == BEFORE


def test_padding_given_as_a_string():
    assert ops(conv(kernel=5, padding="same", dilation=2))[0].geometry.padding == (4, 4)
    assert ops(conv(padding="valid"))[0].geometry.padding == (0, 0)


def hooked() -> nn.Module:
    model = nn.Sequential(conv())
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def head(function) -> nn.Module:
    return Net(lambda net, x: function(net.conv(x)), conv=conv())


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.jit.script(module)


def freed() -> nn.Module:
    model = nn.Sequential(conv())
    model[0].weight.untyped_storage().resize_(0)
    return model


REFUSED = {
    "another activation": (nn.Sequential(conv(), nn.Hardshrink()), r"'1' \(Hardshrink\) is not supported"),
    "several kinds": (
        nn.Sequential(conv(), nn.Hardshrink(), nn.MaxPool2d(2, dilation=2), nn.Hardshrink()),
        r"^'1' \(Hardshrink\) and 1 more is not supported by the engine; '2' \(MaxPool2d\) is a dilated pool, .*\.$",
    ),
    "a batch norm in training": (
        head(lambda y: F.batch_norm(y, torch.zeros(4), torch.ones(4), training=True)),
        "computes the statistics of its input, as in training",
    ),
    "hooks": (hooked(), "'0' has forward hooks"),
    "control flow by values": (Net(lambda net, x: x if x.sum() > 0 else -x), "cannot be traced"),
    "a causal mask": (head(lambda y: F.scaled_dot_product_attention(y, y, y, is_causal=True)), "has arguments"),
    "float64": (conv().double(), "float32"),
    "a transposed convolution that crops": (nn.ConvTranspose2d(4, 4, 3, padding=3), "more padding than its kernel"),
    "no layer": (nn.Identity(), "no layer"),
    "no output": (Net(lambda net, x: None), "returns no tensor"),
    "a dropout that drops": (Net(lambda net, x: F.dropout(net.conv(x)), conv=conv()), "at random"),
    "a mean in float64": (head(lambda y: y.mean((2, 3), dtype=torch.float64)), "'mean' .* returns float64"),
    "a mean of the batch": (head(lambda y: y - y.mean((0, 2, 3), True)), "mixes the images of a batch"),
    "a squeeze of single images": (head(lambda y: y.mean((2, 3), True).squeeze()), "another number or size"),
    "a constant batch": (head(lambda y: y.mean((2, 3), True).view(2, 4)), r"'view'|cannot be traced"),
    "reversed channels": (head(lambda y: y.mean((2, 3), True)[:, [3, 2, 1, 0], 0, 0]), "use slices and whole numbers"),
    "an assignment": (head(lambda y: (y.__setitem__((0, 0), 0), y)[1]), "'__setitem__'"),
    "an assignment to another tensor": (
        head(lambda y: (z := torch.zeros(1, 4, 1, 1), z.__setitem__((0, 0), y[0, 0, :1, :1]), y * z)[2]),
        "'__setitem__'|changes a part of a tensor in place, by __setitem__",
    ),
    "a part that is changed in place": (head(lambda y: (y[:, :2].mul_(2), y)[1] + 1), "changes a part of a tensor"),
    "a write to a weight": (Net(lambda net, x: (net.conv.weight.mul_(2), net.conv(x))[1], conv=conv()), "mul_"),
    "a branch on the size": (head(lambda y: y if y.shape[2] > 3 else -y), "branches on the number or the size"),
    "an odd size": (
        Net(lambda net, x: F.conv2d(x, net.conv.weight, padding=int(x.shape[2]) % 2), conv=conv()),
        "something else for images of another number or size",
    ),
    "a loop over the batch": (
        Net(lambda net, x: sum(net.conv(x) for _ in range(len(x) % 8)), conv=conv()),
        "branches on|something else for images of another number",
    ),
    "TorchScript": (nn.Sequential(scripted(conv())), "'0' is compiled by TorchScript"),
    "a lazy layer": (nn.Sequential(nn.LazyConv2d(4, 3)), "'0' has no weights yet: run the model once"),
    "freed weights": (freed(), r"'0' .*has weights that the engine cannot read.*freed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_message_names_what_is_unsupported(name):
    model, words = REFUSED[name]
    with pytest.raises(UnsupportedError, match=words):
        read(model)


def test_models_with_a_new_forward_compile():
    """Their forward is generated code, without a file."""
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.pointwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return torch.relu(self.dense(x) + self.pointwise(x))

    model = nn.Sequential(Branches(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    plain, _ = repvgg.reparameterize(model)
    x = torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        torch.testing.assert_close(repvgg.engine.compile(plain, (2, 3, 12, 12))(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_depends_on_the_size_is_read_for_one_size():
    """A branch on the height, and an interpolation to the size of the images."""

    def forward(net, x):
        y = net.conv(x)
        y = F.interpolate(y, x.shape[2:], mode="bilinear")
        return y if x.shape[2] > 20 else -y

    model = Net(forward, conv=conv(stride=2)).eval()
    compiled = repvgg.engine.compile(model, (2, 4, 19, 23), 1)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 19, 23)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="was read for 19x23, not 21x23: compile the model once more"):
        compiled(torch.randn(1, 4, 21, 23))


def test_a_sum_replaces_what_nothing_reads_later():
    """Of two summands, the one that is read again stays; an addition of what the convolution reads has no epilogue."""

    def last(net, x):
        a = net.one(x).relu()
        return (net.two(a) + a).relu()

    def kept(net, x):
        a = net.one(x)
        b = net.two(a.relu()) + a
        return b * a

    for function, added in ((last, False), (kept, False), (lambda net, x: net.two(net.one(x).tanh()) + x, True)):
        found = ops(Net(function, one=conv(padding=1), two=conv(padding=1)))
        assert any(isinstance(op, Conv) and ADD in op.epilogue for op in found) == added


def test_views_cost_nothing():
    def shuffle(net, x):
        a, b = net.conv(x).chunk(2, 1)
        return torch.stack((a, b), 2).flatten(1, 2).permute(0, 2, 3, 1).flatten(1, 2)

    assert kinds(Net(lambda net, x: net.conv(x).permute(0, 2, 3, 1).flatten(1, 2), conv=conv())) == [Conv]
    assert Rearrangement not in kinds(Net(shuffle, conv=conv()))
