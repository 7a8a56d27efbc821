import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import repvgg.engine
from repvgg._cache import CACHE_VARIABLE
from repvgg.engine import compiled_model
from repvgg.engine.codegen import disk_cache
from repvgg.engine.codegen.jit import GENERIC_ISAS, host_isa
from repvgg.engine.compiled_model import CompiledModel
from repvgg.engine.frontend import read
from repvgg.engine.graph import Conv, ConvGeometry, infer_shapes
from repvgg.engine.kernels.base import pack_panels, pack_weights, placeholder_weights
from repvgg.engine.planner import autotune, selection_cache
from repvgg.engine.planner import plan as planner
from repvgg.engine.planner.algorithms import ERROR_GROWTH_LIMITS, ConvProblem, Target
from repvgg.engine.planner.cost_model import candidate_algorithms, select_algorithm
from repvgg.engine.runtime.thread_pool import ThreadPool
from repvgg.engine.winograd.filters import winograd2d
from tests.engine.helpers import isas

HOST = Target(isas()[-1], 2)
PADDED = ConvGeometry((3, 3), padding=(1, 1))
STRIDED = ConvGeometry((3, 3), (2, 2), (1, 1))


def problem_of(geometry=PADDED, in_channels=16, out_channels=32, output_size=(9, 10), batch=2) -> ConvProblem:
    return ConvProblem(geometry, in_channels, out_channels, output_size, batch)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(autotune, "_MAX_CANDIDATES", 2)  # fewer and shorter measurements, so that tests are fast
    monkeypatch.setattr(autotune, "_EVICTION_FLOATS", 2**16)
    monkeypatch.setattr(autotune, "_MAX_PARTITIONS", 2)
    return tmp_path / "engine"


@pytest.fixture
def measured(monkeypatch):
    """The problems that are measured, and not read from the cache."""
    problems, real = [], autotune._fastest_algorithm

    def noted(problem, target, pool):
        problems.append(problem)
        return real(problem, target, pool)

    monkeypatch.setattr(autotune, "_fastest_algorithm", noted)
    return problems


@pytest.fixture
def selected(monkeypatch):
    """The problems that would be measured; the cost model takes the place of a measurement, which takes seconds."""
    problems = []

    def noted(problem, target, pool):
        problems.append(problem)
        return select_algorithm(problem, target)

    monkeypatch.setattr(autotune, "_fastest_algorithm", noted)
    return problems


def plain():
    layers = [nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)]
    torch.manual_seed(0)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()


@torch.no_grad()
def test_each_problem_is_measured_once_and_the_output_is_right(measured):
    model, x = plain(), torch.randn(3, 16, 19, 14)
    for _ in range(2):
        compiled = repvgg.engine.compile(model, x.shape, 2, search=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    problems = [ConvProblem(STRIDED, 16, 32, (10, 7), 3), ConvProblem(PADDED, 32, 32, (10, 7), 3)]
    assert measured == problems
    for problem in problems:
        assert selection_cache.read_cached(problem, Target(host_isa(), 2)) is not None


@torch.no_grad()
def test_other_input_sizes_are_not_measured_during_a_call(selected):
    model = plain()
    compiled = repvgg.engine.compile(model, (1, 16, 12, 12), 1, search=True)
    number, x = len(selected), torch.randn(2, 16, 21, 9)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(selected) == number == 2


@torch.no_grad()
def test_a_copy_uses_the_cached_results(selected):
    model, x = plain(), torch.randn(1, 16, 12, 12)
    compiled = repvgg.engine.compile(model, x.shape, 1, search=True)
    number = len(selected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(compiled))(x), compiled(x), rtol=0, atol=0)
    assert len(selected) == number


def test_without_a_cache_each_compilation_measures(selected, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    for _ in range(2):
        repvgg.engine.compile(plain(), (1, 16, 12, 12), 1, search=True)
    assert len(selected) == 4


def test_nothing_is_measured_where_the_direct_kernel_is_the_only_candidate(measured):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 8, 1)).eval()
    repvgg.engine.compile(model, (1, 3, 16, 16), 1, search=True)
    repvgg.engine.compile(plain(), (1, 16, 12, 12), 1, precision="highest", search=True)
    assert measured == []


class NoPool:
    """A thread pool that is never asked to run anything."""

    def quiesce(self):
        pass


def test_slow_candidates_drop_out(monkeypatch):
    """Four candidates that take 4, 1.2, 1 and 1.05 ms."""
    seconds = {0: 4e-3, 1: 1.2e-3, 2: 1e-3, 3: 1.05e-3}
    turns = []

    class Trial:
        def __init__(self, algorithm):
            self.algorithm, self.score = algorithm, seconds[algorithm]

        def turn(self, pool):
            turns.append(self.algorithm)

    bench = autotune.ConvBench(problem_of(), HOST, NoPool())
    monkeypatch.setattr(autotune.ConvBench, "_trial", lambda self, algorithm: Trial(algorithm))
    assert bench.fastest([0, 1, 2, 3], ((2, 1.3), (3, 1.1), (6, 1.0))) == 2
    assert [turns.count(candidate) for candidate in range(4)] == [2, 5, 11, 11]
    assert turns[:8] == [0, 1, 2, 3] * 2


def test_a_score_is_the_mean_of_the_faster_half():
    trial = autotune._Trial(None, None, 1)
    trial._seconds = [5.0, 1.0, 9.0, 2.0, 3.0]
    assert trial.score == 2.0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("on_the_fly", [False, True])
@pytest.mark.parametrize("form", [None, winograd2d(4), winograd2d(2, 3, 2)], ids=str)
@pytest.mark.parametrize("nr", [1, 2, 3])
def test_placeholder_weights_have_the_size_of_packed_ones(nr, form, on_the_fly, groups):
    weight = np.ones((64, 24 // groups, 3, 3), np.float32)
    conv = Conv(weight, np.zeros(64, np.float32), ConvGeometry((3, 3), groups=groups))
    found, wanted = (make(conv, 16, nr, form, on_the_fly) for make in (placeholder_weights, pack_weights))
    assert [array.shape for array in found] == [array.shape for array in wanted]
    assert not np.array_equal(found[0], placeholder_weights(conv, 16, nr, form, on_the_fly)[0])
    assert pack_weights(conv, 16, nr, None, False)[0].tolist() == pack_panels(conv, 16, nr)[0].tolist()


# The cache on disk


@pytest.mark.parametrize("stride", [1, 2])
def test_every_algorithm_survives_the_cache(stride, monkeypatch):
    problem = problem_of(ConvGeometry((3, 3), (stride, stride), (1, 1)))
    assert selection_cache.read_cached(problem, HOST) is None
    for algorithm in [*candidate_algorithms(problem, HOST), None]:
        selection_cache.write_cached(problem, HOST, algorithm)
        assert selection_cache.read_cached(problem, HOST) == (algorithm,)
    assert selection_cache.read_cached(problem, Target(HOST.isa, 1)) is None
    # With another error budget, other tiles may be faster.
    monkeypatch.setitem(ERROR_GROWTH_LIMITS, HOST.precision, 1.01 * ERROR_GROWTH_LIMITS[HOST.precision])
    assert selection_cache.read_cached(problem, HOST) is None


def test_what_the_cost_model_selects_is_kept_on_disk(monkeypatch):
    """Apart from measured results, and for the costs of the processor."""
    problem, asked = problem_of(), []

    def noted(problem, target):
        asked.append(target.costs)
        return select_algorithm(problem, target)

    monkeypatch.setattr(selection_cache, "select_algorithm", noted)
    other = replace(HOST, costs=replace(HOST.costs, input_transform_cycles=25.0))
    for target in (HOST, HOST, other, other):
        selection_cache.select_cached.cache_clear()
        assert selection_cache.select_cached(problem, target) == select_algorithm(problem, target)
    assert asked == [HOST.costs, other.costs]
    assert selection_cache.read_cached(problem, HOST) is None
    selection_cache.select_cached.cache_clear()


# As the first version wrote them: its key for the problem, and a region for each entry: rows, columns, schedule,
# on the fly, splits, register tile, tiles per block. Its name of the staged schedule was "product".
OLD_KEY = (
    "((3, 3), (1, 1), (1, 1), (1, 1), 1)",
    "(64, 64, (14, 14), 4, 1)",
    "(('avx512', 16, 32, 'x86-64-v4', '', ''), 2, 'high')",
    "1.15",
)
OLD_FILES = {
    "staged": [[[0, 4, 4, 0], [0, 4, 4, 0], "product", False, 1, 3, 4, 33]],
    "fused, split, on the fly": [[[0, 2, 7, 0], [0, 4, 4, 0], "fused", True, 2, 15, 1, 30]],
    "four regions": [
        [[0, 4, 3, 0], [0, 4, 3, 0], "fused", False, 1, 6, 4, 36],
        [[0, 4, 3, 0], [12, 2, 1, 0], "fused", False, 1, 6, 4, 12],
        [[12, 2, 1, 0], [0, 4, 3, 0], "fused", False, 1, 6, 4, 6],
        [[12, 2, 1, 0], [12, 2, 1, 0], "fused", False, 1, 4, 4, 4],
    ],
    "edge tiles": [[[0, 4, 4, 2], [0, 3, 5, 2], "product", False, 1, 15, 1, 80]],
    "direct": "direct",
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_files_of_the_first_version_are_read(name, folder):
    digest = hashlib.sha256()
    for part in (repvgg.__version__, *OLD_KEY):
        digest.update(f"{len(part)} {part}".encode())
    content = json.dumps(OLD_FILES[name]).encode()
    folder.mkdir(parents=True)
    head = b"repvgg engine 1\n" + digest.digest() + hashlib.sha256(content).digest()
    (folder / f"{digest.hexdigest()}.choice").write_bytes(head + content)

    problem, target = ConvProblem(PADDED, 64, 64, (14, 14), 4), Target(GENERIC_ISAS["avx512"], 2)
    cached = selection_cache.read_cached(problem, target)
    assert cached is not None
    (algorithm,) = cached
    if name == "direct":
        assert algorithm is None
        return
    assert [list(map(list, region.tiles)) for region in algorithm.regions] == [one[:2] for one in OLD_FILES[name]]
    assert [[region.schedule, region.on_the_fly, region.out_channel_splits] for region in algorithm.regions] == [
        [one[2].replace("product", "staged"), *one[3:5]] for one in OLD_FILES[name]
    ]
    selection_cache.write_cached(problem, target, algorithm)
    (path,) = folder.iterdir()  # the same name and bytes are written now
    assert path.read_bytes() == head + content


MALFORMED = {
    "not JSON": b"{",
    "another type": b"7",
    "no regions": b"[]",
    "regions that are no lists": b"[1, 2]",
    "an unknown register tile": None,
    "an unknown block size": None,
    "an unknown partition": None,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_ignored(name):
    """Even with a valid checksum and key: block and tile sizes are never taken from a file."""
    problem = ConvProblem(PADDED, 64, 64, (12, 12), 1)
    algorithm = select_algorithm(problem, HOST)
    selection_cache.write_cached(problem, HOST, algorithm)
    key = selection_cache._cache_key(problem, HOST)
    regions = json.loads(disk_cache.read_entry(key, ".choice"))
    if name == "an unknown register tile":
        regions[0][4] = 99
    if name == "an unknown block size":
        regions[0][-1] = 10**6
    if name == "an unknown partition":
        regions[0][0][2] += 5
    disk_cache.write_entry(key, ".choice", MALFORMED[name] or json.dumps(regions).encode())
    assert selection_cache.read_cached(problem, HOST) is None


def test_clear_cache_removes_tuning_results(folder):
    selection_cache.write_cached(problem_of(), HOST, None)
    assert [path.suffix for path in folder.iterdir()] == [".choice"]
    repvgg.engine.clear_cache()
    assert not list(folder.iterdir())


# Measuring


def test_images_produce_the_output_size_of_the_problem():
    """For odd and even sizes, with and without padding, for both strides."""
    for geometry in (PADDED, STRIDED, ConvGeometry((3, 3)), ConvGeometry((3, 3), (2, 2))):
        for image in ((1, 1), (7, 4), (14, 13)):
            bench = autotune.ConvBench(ConvProblem(geometry, 16, 16, image, 1), HOST, NoPool())
            assert geometry.output_size(bench._images.shape[2:]) == image


def test_a_layer_is_measured_without_chunking_its_batch(monkeypatch):
    """A candidate is made for a batch size: on chunks of it, it would write beyond the last image."""
    monkeypatch.setattr(planner, "_MIN_CHUNKED_FLOATS", 10)
    monkeypatch.setattr(planner, "_L3_FLOATS", 3000)
    bench = autotune.ConvBench(problem_of(), HOST, ThreadPool(HOST.isa, 2))
    graph, shape = bench._graph, bench._images.shape
    chunks = planner.chunk_batch(graph, infer_shapes(graph, [shape[2:]]), shape[0])
    assert chunks == planner.BatchChunks(1, 1)
    for algorithm in [*candidate_algorithms(problem_of(), HOST)][:4]:
        steps = bench._trial(algorithm)._executable.plan.steps
        assert {(step.first_image, step.max_images) for step in steps} == {(0, None)}


def test_the_slowest_candidates_compute_the_same(monkeypatch):
    """Whatever a measurement selects is right: here the candidates with the highest estimates."""

    def slowest(problem, target):
        return max(candidate_algorithms(problem, target), key=lambda algorithm: algorithm.estimated_cycles)

    monkeypatch.setattr(compiled_model, "select_cached", slowest)
    model, x = plain(), torch.randn(2, 16, 19, 14)
    compiled = CompiledModel(read(model), [tuple(x.shape)], HOST.isa, 2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
