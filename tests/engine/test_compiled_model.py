import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import repvgg.engine
from repvgg import ModelSpec, create_model
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.planner import plan as planner
from repvgg.errors import UnsupportedError, UsageError
from repvgg.measure import walk
from repvgg.models.spec import SqueezeExciteSpec, Stage
from tests.engine.emulation import compile_for
from tests.engine.helpers import isa_params, isas


def small_spec(groups: int = 1, gate=None) -> ModelSpec:
    """A small architecture with odd widths, in which every second layer has groups."""
    return ModelSpec("small", Stage(1, 12), (Stage(3, 20), Stage(2, 36, stride=1)), groups, gate)


SPECS = {
    "plain": small_spec(),
    "groups": small_spec(groups=4),
    "gate before the ReLU": small_spec(gate=SqueezeExciteSpec("before_relu", 4)),
    "gate after the ReLU": small_spec(gate=SqueezeExciteSpec("after_relu", 2)),
}


def plain(spec="repvgg_t0", classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return create_model(spec, num_classes=classes, plain=True).eval()


@torch.no_grad()
def assert_equal(network, model: nn.Module, x: torch.Tensor) -> None:
    wanted = model.double()(x.double())
    model.float()
    scale = wanted.abs().max().item()
    torch.testing.assert_close(network(x).double(), wanted, rtol=0, atol=4e-6 * scale)


@pytest.mark.parametrize("isa", isa_params())
@pytest.mark.parametrize("name", SPECS)
def test_small_architectures(name, isa):
    model = plain(SPECS[name])
    network = compile_for(read(model), [(3, 3, 37, 29)], isa)
    assert_equal(network, model, torch.randn(3, 3, 37, 29))


def test_batches_of_all_sizes_in_turn():
    """Each call needs zero borders, whatever ran before."""
    model = plain()
    network = repvgg.engine.compile(model, (19, 3, 32, 32))
    for batch in (19, 1, 8, 9, 19):
        assert_equal(network, model, torch.randn(batch, 3, 32, 32))


@pytest.fixture
def small_l3(monkeypatch):
    """Feature maps of more than a thousand values are chunked, and twenty thousand fill L3."""
    monkeypatch.setattr(planner, "_MIN_CHUNKED_FLOATS", 1000)
    monkeypatch.setattr(planner, "_L3_FLOATS", 20_000)


@pytest.mark.parametrize("name", SPECS)
def test_early_layers_in_chunks_of_the_batch(name, small_l3):
    """For all batches up to the largest, of any strides, on buffers that hold the values of earlier calls."""
    model = plain(SPECS[name])
    network = repvgg.engine.compile(model, (12, 3, 37, 29), 2)
    firsts = [step.first_image for step in network.plan.steps]
    assert sorted(set(firsts)) == [0, 3, 6, 9]
    assert firsts[-1] == 0  # the last layers process all images at once
    distinct = {(step.name, step.kernel) for step in network.plan.steps}
    assert len(network._executables[0]._weights) <= 2 * len(distinct)  # weights and biases: chunks share them
    for batch in (12, 1, 5, 8, 12):
        x = torch.randn(batch, 3, 37, 29)
        assert_equal(network, model, x.contiguous(memory_format=torch.channels_last) if batch == 8 else x)


def test_a_profile_adds_up_the_chunks_of_a_batch(small_l3):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    network = CompiledModel(read(model), [(6, 3, 24, 24)], isas()[-1])
    assert len(network.plan.steps) > 3
    for batch in (6, 5):
        x = torch.randn(batch, 3, 24, 24)
        steps = network.profile(x, repeats=2)
        # A step that zeroes a border, in memory that another layout had before, has the name of its feature map.
        assert list(dict.fromkeys(step.name for step in steps)) == ["input", "0", "2"]
        assert sum(step.num_multiplies for step in steps) == walk(model, x).macs


def test_each_precision_meets_its_error_budget():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(4, 16, 15, 15)
    wanted = model.double()(x.double()).detach()
    model.float()
    for precision, limit in (("highest", 2e-6), ("high", 4e-6), ("medium", 1e-4)):
        network = repvgg.engine.compile(model, x.shape, 1, precision=precision)
        torch.testing.assert_close(network(x).double(), wanted, rtol=0, atol=limit)
    with pytest.raises(UsageError, match="precision must be one of 'highest', 'high', 'medium', not 'low'"):
        repvgg.engine.compile(model, x.shape, precision="low")


def test_a_profile_names_each_step_and_counts_multiplications():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    network = CompiledModel(read(model), [(2, 3, 16, 16)], isas()[-1])
    x = torch.randn(2, 3, 16, 16)
    steps = network.profile(x, repeats=2)
    names = [step.name for step in steps]
    assert list(dict.fromkeys(names)) == ["input", "0", "2"]
    assert sum(step.num_multiplies for step in steps) == sum(step.muls for step in steps) == walk(model, x).macs
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-5)
    lines = str(steps).splitlines()
    assert lines[0].split() == ["layer", "kernel", "us", "share", "GFLOP/s"]
    assert [line.split()[0] for line in lines[1:]] == [*names, "all"]
    assert "direct, tiles of" in lines[1 + names.index("0")]


def test_the_former_names_are_aliases():
    assert repvgg.engine.Network is repvgg.engine.CompiledModel
    assert repvgg.engine.InTorch is repvgg.engine.TorchFallback


def test_inputs_of_any_strides_give_the_same_output():
    model = plain()
    network = repvgg.engine.compile(model, (4, 3, 32, 32))
    x = torch.randn(4, 3, 32, 32)
    wanted = network(x)
    wide = torch.randn(4, 5, 40, 40)
    wide[:, 1:4, 2:34, 3:35] = x
    for same in (x.contiguous(memory_format=torch.channels_last), wide[:, 1:4, 2:34, 3:35], x.requires_grad_()):
        torch.testing.assert_close(network(same), wanted, rtol=0, atol=0)


def test_outputs_are_not_overwritten_by_the_next_call():
    network = repvgg.engine.compile(plain(), (1, 3, 32, 32))
    first = network(torch.zeros(1, 3, 32, 32))
    copy = first.clone()
    network(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(first, copy, rtol=0, atol=0)


@pytest.mark.parametrize("flat", [True, False])
def test_no_images_give_an_empty_output_of_pytorchs_shape(flat):
    model = plain() if flat else nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.ReLU()).eval()
    network = repvgg.engine.compile(model, (2, 3, 32, 32))
    x = torch.zeros(0, 3, 32, 24)
    out = network(x)
    assert out.shape == model(x).shape
    assert (out.dtype, type(network(x.numpy()))) == (torch.float32, np.ndarray)
    assert_equal(network, model, torch.randn(1, 3, 32, 24))
    with pytest.raises(UsageError, match="at least one image"):
        network.profile(x)


def test_an_infinite_pixel_stays_local_in_the_highest_precision():
    """Winograd's transforms subtract pixels of a tile, so that it spreads over the outputs of the tile there."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
    x = torch.randn(1, 16, 14, 14)
    for value in (float("inf"), -float("inf"), float("nan"), 1e30):
        x[0, 3, 5, 6] = value
        wanted = model(x).detach()
        found = repvgg.engine.compile(model, x.shape, 1, precision="highest")(x)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    x[0, 3, 5, 6] = float("inf")
    spread = repvgg.engine.compile(model, x.shape, 1)(x)
    near = spread.isfinite().logical_not().any(1)[0].nonzero()
    assert (near - torch.tensor([5, 6])).abs().max() < 8  # a tile, not the image


def test_feature_maps_as_output():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 1)).eval()
    assert_equal(repvgg.engine.compile(model, (2, 3, 9, 8)), model, torch.randn(2, 3, 9, 8))


def test_two_linear_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 30), nn.ReLU(), nn.Linear(30, 3)
    ).eval()
    assert_equal(repvgg.engine.compile(model, (11, 3, 9, 8)), model, torch.randn(11, 3, 9, 8))


def test_weights_are_copied():
    model = plain()
    network = repvgg.engine.compile(model, (1, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    before = network(x)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(1, 3, 0, 32), r"\(n, 3, H, W\).*got torch.float32 of shape \(1, 3, 0, 32\)"),
        (torch.zeros(1, 4, 32, 32), r"\(1, 4, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32).double(), "float64"),
        (torch.zeros(1, 3, 32, 32, device="meta"), "meta"),
        (torch.zeros(1, 3, 32, 32).to_sparse(), "sparse"),
        (np.zeros((1, 3, 32, 32)), "an array of float64"),
        (np.zeros((1, 3, 32, 32), np.uint8), "uint8"),
        (np.zeros((1, 3, 32, 32), ">f4"), ">f4"),
        ([[[[0.0]]]], "a list"),
    ],
)
def test_wrong_inputs_are_refused(x, words):
    network = repvgg.engine.compile(plain(), (2, 3, 32, 32))
    with pytest.raises(UsageError, match=words):
        network(x)


def test_layers_that_do_not_fit_the_input_are_named():
    with pytest.raises(UnsupportedError, match=r"'stem.conv' expects 3 channels but receives 4: pass an input_shape"):
        repvgg.engine.compile(plain(), (1, 4, 32, 32))
    with pytest.raises(UnsupportedError, match=r"'1' has no output for feature maps of 1x1: pass larger images"):
        repvgg.engine.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), (1, 3, 3, 3))
    with pytest.raises(UsageError, match="4 positive integers"):
        repvgg.engine.compile(plain(), (1, 3, 0, 32))


def test_what_is_no_plain_model_is_refused_with_what_to_do():
    train = create_model("repvgg_t0", num_classes=10)
    for wrong, words in [
        ("plain.pt", "load it first"),
        (train.state_dict(), "load_state_dict"),
        (type(train), "RepVGG"),
    ]:
        with pytest.raises(UsageError, match=f"^repvgg.engine.compile takes a model, not .*{words}"):
            repvgg.engine.compile(wrong, (1, 3, 32, 32))


def test_a_call_from_a_second_thread_is_refused():
    network = repvgg.engine.compile(plain(), (1, 3, 32, 32))
    messages = []

    def second() -> None:
        try:
            network(torch.zeros(1, 3, 32, 32))
        except UsageError as error:
            messages.append(str(error))

    with network._lock:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another thread" in messages[0]
    network(torch.zeros(1, 3, 32, 32))


def test_code_is_freed_with_the_model():
    network = repvgg.engine.compile(plain(), (1, 3, 32, 32))
    code = [weakref.ref(network._executables[0]._code), weakref.ref(network._pool._code)]
    del network
    gc.collect()
    assert [one() for one in code] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b0", "repvgg_b1g4", "repvgg_d2se"])
def test_published_architectures(name):
    model = plain(name, classes=1000)
    assert_equal(repvgg.engine.compile(model, (1, 3, 224, 224)), model, torch.randn(1, 3, 224, 224))
