import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import repvgg.engine
from repvgg.engine.codegen import disk_cache
from repvgg.engine.codegen.jit import host_isa
from repvgg.engine.compiled_model import Network
from repvgg.engine.executable import Runner
from repvgg.engine.frontend import read
from repvgg.engine.graph import Conv, ConvGeometry
from repvgg.engine.kernels.base import any_weights, packed
from repvgg.engine.kernels.direct_conv import pack
from repvgg.engine.planner import autotune, memory_plan
from repvgg.engine.planner.algorithms import LOSSES, Machine, Size
from repvgg.engine.planner.cost_model import choose, every_choice
from repvgg.engine.planner.plan import Ways
from repvgg.engine.runtime.thread_pool import ThreadPool
from repvgg.engine.winograd.filters import winograd
from tests.engine.helpers import isas

HOST = Machine(isas()[-1], 2)
PADDED = ConvGeometry((3, 3), padding=(1, 1))
STRIDED = ConvGeometry((3, 3), (2, 2), (1, 1))
SIZE = Size(16, 32, (9, 10), 2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(disk_cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(autotune, "_WAYS", 3)  # fewer are looked into, so that it takes less time
    monkeypatch.setattr(autotune, "_COVERS", 2)
    return tmp_path / "engine"


@pytest.fixture
def measured(monkeypatch):
    """What was really measured."""
    found, real = [], autotune._fastest_choice

    def noted(geometry, size, machine, pool):
        found.append((geometry, size))
        return real(geometry, size, machine, pool)

    monkeypatch.setattr(autotune, "_fastest_choice", noted)
    return found


def plain():
    layers = [nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)]
    torch.manual_seed(0)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()


@torch.no_grad()
def test_measured_once_for_each_kind_and_right(measured):
    model, x = plain(), torch.randn(3, 16, 19, 14)
    for _ in range(2):
        network = repvgg.engine.compile(model, x.shape, 2, search=True)
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-5)
    kinds = [(STRIDED, Size(16, 32, (10, 7), 3)), (PADDED, Size(32, 32, (10, 7), 3))]
    assert measured == kinds
    for geometry, size in kinds:
        assert autotune.recall(geometry, size, Machine(host_isa(), 2)) is not None


@torch.no_grad()
def test_other_sizes_are_not_measured_while_somebody_waits(measured):
    model = plain()
    network = repvgg.engine.compile(model, (1, 16, 12, 12), 1, search=True)
    number, x = len(measured), torch.randn(2, 16, 21, 9)
    torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(measured) == number == 2


@torch.no_grad()
def test_a_copy_takes_what_was_found(measured):
    model, x = plain(), torch.randn(1, 16, 12, 12)
    network = repvgg.engine.compile(model, x.shape, 1, search=True)
    number = len(measured)
    torch.testing.assert_close(pickle.loads(pickle.dumps(network))(x), network(x), rtol=0, atol=0)
    assert len(measured) == number


def test_without_a_cache_it_is_measured_each_time(measured, monkeypatch):
    monkeypatch.setenv(disk_cache.VARIABLE, "off")
    for _ in range(2):
        repvgg.engine.compile(plain(), (1, 16, 12, 12), 1, search=True)
    assert len(measured) == 4


def test_nothing_to_search_for(measured):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 8, 1)).eval()
    repvgg.engine.compile(model, (1, 3, 16, 16), 1, search=True)
    repvgg.engine.compile(plain(), (1, 16, 12, 12), 1, precision="highest", search=True)
    assert measured == []


def test_what_falls_behind_drops_out(monkeypatch):
    """Four ways that take 4, 1.2, 1 and 1.05 ms, and whose clock stands still for all else."""
    seconds = {0: 4e-3, 1: 1.2e-3, 2: 1e-3, 3: 1.05e-3}
    turns = []

    class Trial:
        def __init__(self, choice):
            self.choice, self.score = choice, seconds[choice]

        def turn(self, pool):
            turns.append(self.choice)

    field = autotune._Field(PADDED, SIZE, HOST, NoPool())
    monkeypatch.setattr(autotune._Field, "_trial", lambda self, choice: Trial(choice))
    assert field.best([0, 1, 2, 3], ((2, 1.3), (3, 1.1), (6, 1.0))) == 2
    assert [turns.count(choice) for choice in range(4)] == [2, 5, 11, 11]
    assert turns[:8] == [0, 1, 2, 3] * 2


class NoPool:
    """A pool that does nothing."""

    def quiesce(self):
        pass


def test_a_score_is_the_mean_of_the_faster_half():
    trial = autotune._Trial(None, None, 1)
    trial._seconds = [5.0, 1.0, 9.0, 2.0, 3.0]
    assert trial.score == 2.0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("form", [None, winograd(4), winograd(2, 3, 2)], ids=str)
@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_weights_that_stand_for_others_are_as_many(vectors, form, late, groups):
    weight = np.ones((64, 24 // groups, 3, 3), np.float32)
    conv = Conv("conv", weight, np.zeros(64, np.float32), ConvGeometry((3, 3), groups=groups))
    found, wanted = (make(conv, 16, vectors, form, late) for make in (any_weights, packed))
    assert [array.shape for array in found] == [array.shape for array in wanted]
    assert not np.array_equal(found[0], any_weights(conv, 16, vectors, form, late)[0])
    assert packed(conv, 16, vectors, None, False)[0].tolist() == pack(conv, 16, vectors)[0].tolist()


@pytest.mark.parametrize("stride", [1, 2])
def test_each_choice_is_remembered_as_it_is(stride, monkeypatch):
    geometry = ConvGeometry((3, 3), (stride, stride), (1, 1))
    assert autotune.recall(geometry, SIZE, HOST) is None
    for choice in [*every_choice(SIZE, stride, HOST), None]:
        autotune.remember(geometry, SIZE, HOST, choice)
        assert autotune.recall(geometry, SIZE, HOST) == (choice,)
    assert autotune.recall(geometry, SIZE, Machine(HOST.isa, 1)) is None
    monkeypatch.setitem(LOSSES, HOST.precision, 1.01 * LOSSES[HOST.precision])  # other tiles may be faster then
    assert autotune.recall(geometry, SIZE, HOST) is None


BAD = {
    "no JSON": b"{",
    "another thing": b"7",
    "other parts": b"[]",
    "no lists": b"[1, 2]",
    "no such tile": None,
    "no such piece": None,
    "another cover": None,
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_makes_no_sense_chooses_nothing(name):
    """Even if it is whole, and about this convolution: sizes of pieces and tiles are never taken from a file."""
    choice = choose(PADDED, Size(64, 64, (12, 12), 1), HOST)
    size = Size(64, 64, (12, 12), 1)
    autotune.remember(PADDED, size, HOST, choice)
    path, key = autotune._place(PADDED, size, HOST)
    said = json.loads(disk_cache.read_kept(path, key))
    if name == "no such tile":
        said[0][4] = 99
    if name == "no such piece":
        said[0][-1] = 10**6
    if name == "another cover":
        said[0][0][2] += 5
    disk_cache.keep(path, key, BAD[name] or json.dumps(said).encode())
    assert autotune.recall(PADDED, size, HOST) is None


def test_cleared_with_the_code(folder):
    autotune.remember(PADDED, SIZE, HOST, None)
    assert [path.suffix for path in folder.iterdir()] == [".choice"]
    repvgg.engine.clear_cache()
    assert not list(folder.iterdir())


def test_images_of_the_search_are_those_of_the_layer():
    """Odd and even sizes, paddings and strides: the output that is asked for comes out."""
    for geometry in (PADDED, STRIDED, ConvGeometry((3, 3)), ConvGeometry((3, 3), (2, 2))):
        for image in ((1, 1), (7, 4), (14, 13)):
            field = autotune._Field(geometry, Size(16, 16, image, 1), HOST, NoPool())
            assert geometry.output_size(field._images.shape[2:]) == image


def test_a_layer_is_measured_on_whole_batches(monkeypatch):
    """A way is made for a number of images: on parts of them it would write behind the last."""
    monkeypatch.setattr(memory_plan, "_LARGE", 10)
    monkeypatch.setattr(memory_plan, "_HELD", 3000)
    field = autotune._Field(PADDED, SIZE, HOST, ThreadPool(HOST.isa, 2))
    assert memory_plan.early_layers([field._layer], field._images.shape) == (1, 1)
    for choice in [*every_choice(SIZE, 1, HOST)][:4]:
        steps = field._trial(choice)._runner.plan.steps
        assert {(step.first, step.limit) for step in steps} == {(0, None)}


def test_the_slowest_way_gives_the_same():
    """Whatever a search finds is right: here what the table likes least."""
    model, x = plain(), torch.randn(2, 16, 19, 14)
    layers = read(model)
    network = Network(layers, tuple(x.shape), HOST.isa, 2)

    def slow(geometry, size, machine):
        return max(every_choice(size, geometry.stride[0], machine), key=lambda choice: choice.cycles)

    network._runners = [Runner(layers, tuple(x.shape), HOST, (), Ways(slow))]
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-5)
