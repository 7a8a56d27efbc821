"""The activation peak: against values computed manually, and against PyTorch's allocator."""

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from repvgg import reparameterize
from repvgg.measure import walk
from repvgg.models import create_model

FLOAT = 4


def allocated(model: nn.Module, x: Tensor) -> int:
    """Return the peak of the allocator during a forward pass, the images included."""
    with torch.no_grad():
        model.eval()(x)  # one-time allocations
        with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            y = model(x)
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated_bytes = [x.untyped_storage().nbytes()]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        allocated_bytes.append(allocated_bytes[-1] + event.nbytes())
    assert y.numel()
    return max(allocated_bytes)


class Residual(nn.Module):
    """y = x + b(relu(a(x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


class Branches(nn.Module):
    """Four branches that are all computed before they are added."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x * number for number in range(4)]).sum(0)


# name: (network, input shape, live values at the peak)
NETS = {
    "chain": (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), (16, 8), 16 * (8 + 32 + 32)),
    "chain in place": (nn.Sequential(nn.Linear(8, 32), nn.ReLU(True), nn.Linear(32, 4)), (16, 8), 16 * (8 + 32 + 4)),
    "residual": (Residual(8, 32), (16, 8), 16 * (8 + 32 + 32)),
    "residual after another": (nn.Sequential(Residual(8, 32), Residual(8, 32)), (16, 8), 16 * (8 + 8 + 32 + 32)),
    "branches": (Branches(), (16, 8), 16 * 8 * (1 + 4 + 4)),
    "views": (nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.ReLU()), (16, 8), 16 * (8 + 8)),
}


@pytest.mark.parametrize("name", NETS)
def test_peak_by_hand_and_by_the_allocator(name):
    model, shape, values = NETS[name]
    x = torch.ones(shape)
    assert walk(model, x).peak == FLOAT * values
    assert walk(model.to("meta"), x.to("meta")).peak == FLOAT * values
    model = NETS[name][0].to_empty(device="cpu")
    assert allocated(model, x) == FLOAT * values


class Pointwise(nn.Module):
    """Three branches, as in a RepVGG block, of 1x1 convolutions, which need no scratch memory in float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norms[0](self.first(x)) + self.norms[1](self.second(x)) + self.norms[2](x))


@pytest.mark.parametrize("plain", [False, True])
def test_block_and_its_plain_form(plain):
    """Live at the peak: the input and three maps in the train form, the input and two in the plain form."""
    block, x = Pointwise(8).double().eval(), torch.ones(2, 8, 16, 16, dtype=torch.float64)
    model = reparameterize(block)[0] if plain else block
    peak = 2 * FLOAT * x.numel() * (3 if plain else 4)
    scratch = 0 if plain else 2 * FLOAT * 2 * 8  # the batch norm kernel allocates scale and shift
    assert walk(model, x).peak == peak
    assert allocated(model, x) == peak + scratch


def test_scratch_memory_of_kernels_is_not_in_the_peak():
    """A convolution may reorder its input and weight: the allocator sees that, and the peak does not."""
    model = create_model("repvgg_t0", 10, plain=True).eval()
    x = torch.ones(2, 3, 32, 32)
    peak = walk(model, x).peak
    stem, half = 2 * 16 * 32 * 32, 2 * 32 * 16 * 16
    # second block of the first stage: its input, convolution and ReLU; the model keeps the input of the stage
    assert peak == FLOAT * (x.numel() + stem + 3 * half)
    assert peak <= allocated(model, x)


def test_plain_form_has_a_lower_peak():
    """Figure 3 of the paper: a plain layer needs its input and output, branches need more."""
    with torch.device("meta"):
        train = create_model("repvgg_a0").eval()
        x = torch.empty(1, 3, 224, 224)
    plain, _ = reparameterize(train)
    stem = 48 * 112 * 112
    assert walk(plain, x).peak == FLOAT * (x.numel() + 2 * stem)  # outputs of the stem and of its ReLU
    assert walk(train, x).peak == FLOAT * (x.numel() + 3 * stem)


def test_walk_keeps_no_tensor_alive():
    """Of ten layers in a row, two outputs are live at a time."""
    model = nn.Sequential(*(nn.Hardswish() for _ in range(10)))
    assert walk(model, torch.ones(100)).peak == FLOAT * 300
    live = [op.live_bytes for op in walk(model, torch.ones(100)).ops]
    assert live == [FLOAT * 200] + [FLOAT * 300] * 9


def test_tensor_stored_by_the_model_stays_live():
    class Storing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.stored = [x + number for number in range(5)]
            return self.stored[0]

    assert walk(Storing(), torch.ones(100)).peak == FLOAT * 600


def test_parameters_and_buffers_do_not_count():
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000))
    assert walk(model, torch.ones(1, 1000)).peak == FLOAT * 3000
