"""The activation peak: by hand, and beside what the allocator of PyTorch really handed out."""

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as watching

from repvgg import reparameterize
from repvgg.measure import walk
from repvgg.models import create_model

FLOAT = 4


def allocated(model: nn.Module, x: Tensor) -> int:
    """The most bytes that the allocator has handed out during a forward, with the images, which are there before."""
    with torch.no_grad():
        model.eval()(x)  # what is allocated once
        with watching(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
            y = model(x)
    changes = [event for event in watch.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [x.untyped_storage().nbytes()]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held.append(held[-1] + event.nbytes())
    assert y.numel()
    return max(held)


class Residual(nn.Module):
    """y = x + b(relu(a(x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Branches(nn.Module):
    """Four branches that are all made before they are added."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x * number for number in range(4)]).sum(0)


# name: (network, shape of its input, values that are held at the highest)
NETS = {
    "chain": (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), (16, 8), 16 * (8 + 32 + 32)),
    "chain in place": (nn.Sequential(nn.Linear(8, 32), nn.ReLU(True), nn.Linear(32, 4)), (16, 8), 16 * (8 + 32 + 4)),
    "residual": (Residual(8, 32), (16, 8), 16 * (8 + 32 + 32)),
    "residual after another": (nn.Sequential(Residual(8, 32), Residual(8, 32)), (16, 8), 16 * (8 + 8 + 32 + 32)),
    "branches": (Branches(), (16, 8), 16 * 8 * (1 + 4 + 4)),
    "views": (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.ReLU()), (16, 8), 16 * (8 + 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_by_hand_and_by_the_allocator(name):
    model, shape, values = NETS[name]
    x = torch.ones(shape)
    assert walk(model, x).peak == FLOAT * values
    assert walk(model.to("meta"), x.to("meta")).peak == FLOAT * values
    model = NETS[name][0].to_empty(device="cpu")
    assert allocated(model, x) == FLOAT * values


class Pointwise(nn.Module):
    """Three branches, as in a block of RepVGG, of 1x1 convolutions: in float64 they need no memory of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norms[0](self.first(x)) + self.norms[1](self.second(x)) + self.norms[2](x))


@pytest.mark.parametrize("plain", [False, True])
def test_a_block_and_its_plain_form(plain):
    """The train form holds its input and three of its size, the plain one its input and two."""
    block, x = Pointwise(8).double().eval(), torch.ones(2, 8, 16, 16, dtype=torch.float64)
    model = reparameterize(block)[0] if plain else block
    peak = 2 * FLOAT * x.numel() * (3 if plain else 4)
    inside = 0 if plain else 2 * FLOAT * 2 * 8  # the kernel of a batch norm makes a scale and a shift of its statistics
    assert walk(model, x).peak == peak
    assert allocated(model, x) == peak + inside


def test_what_kernels_take_for_themselves_comes_on_top():
    """A convolution may reorder its input and its weight: the allocator sees that, and the peak leaves it out."""
    model = create_model("repvgg_t0", 10, plain=True).eval()
    x = torch.ones(2, 3, 32, 32)
    peak = walk(model, x).peak
    stem, half = 2 * 16 * 32 * 32, 2 * 32 * 16 * 16
    # the second block of the first stage: its input, its convolution and its ReLU; the model holds the stage's input
    assert peak == FLOAT * (x.numel() + stem + 3 * half)
    assert peak <= allocated(model, x)


def test_a_plain_model_holds_less_than_branches():
    """Figure 3 of the paper: a plain layer holds its input and its output, branches hold more."""
    with torch.device("meta"):
        train = create_model("repvgg_a0").eval()
        x = torch.empty(1, 3, 224, 224)
    plain, _ = reparameterize(train)
    stem = 48 * 112 * 112
    assert walk(plain, x).peak == FLOAT * (x.numel() + 2 * stem)  # the output of the stem, and of its ReLU
    assert walk(train, x).peak == FLOAT * (x.numel() + 3 * stem)


def test_nothing_is_kept_alive_by_the_walk():
    """Of ten layers in a row, two outputs are held at a time."""
    model = nn.Sequential(*(nn.Hardswish() for _ in range(10)))
    assert walk(model, torch.ones(100)).peak == FLOAT * 300
    held = [op.live_bytes for op in walk(model, torch.ones(100)).ops]
    assert held == [FLOAT * 200] + [FLOAT * 300] * 9


def test_an_output_that_the_model_keeps_stays_held():
    class Keeping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = [x + number for number in range(5)]
            return self.kept[0]

    assert walk(Keeping(), torch.ones(100)).peak == FLOAT * 600


def test_parameters_and_buffers_are_apart():
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000))
    assert walk(model, torch.ones(1, 1000)).peak == FLOAT * 3000
