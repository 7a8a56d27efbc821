"""Calibration of the cost model: the fit, the file, and when it runs."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
from torch import nn

import repvgg.engine
from repvgg._cache import CACHE_VARIABLE
from repvgg.engine.codegen.jit import GENERIC_ISAS, host_isa
from repvgg.engine.planner import calibration
from repvgg.engine.planner.algorithms import Target
from repvgg.engine.planner.calibration import (
    CALIBRATE_VARIABLE,
    PROBLEMS,
    Measurement,
    calibrated_costs,
    candidates_for,
    fit_costs,
    misfit,
    regret,
)
from repvgg.engine.planner.machine_costs import AVX2_COSTS

TARGET = Target(GENERIC_ISAS["avx2"], 2, costs=AVX2_COSTS)


@pytest.fixture(scope="module")
def algorithms():
    return [candidates_for(problem, TARGET) for problem in PROBLEMS]


def measured_with(costs, algorithms, noise=0.0):
    """What a machine with these costs would measure at 3 GHz."""
    random, target = np.random.default_rng(0), replace(TARGET, costs=costs)
    found = []
    for problem, some in zip(PROBLEMS, algorithms, strict=True):
        one = Measurement(problem, tuple(some), (0.0,) * len(some))
        seconds = [cycles / 3e9 * math.exp(noise * random.standard_normal()) for cycles in one.estimates(target)]
        found.append(replace(one, seconds=tuple(seconds)))
    return found


def test_candidates_are_of_every_kind(algorithms):
    for some in algorithms:
        kinds = {(region.schedule, region.on_the_fly) for one in some if one for region in one.regions}
        assert len(kinds) == len(some) - 1
        assert {schedule for schedule, _ in kinds} == {"staged", "fused"}
    assert max(map(len, algorithms)) == 5


def test_a_slow_memory_and_slow_transforms_are_found(algorithms):
    costs = replace(
        AVX2_COSTS,
        input_transform_cycles=2.5 * AVX2_COSTS.input_transform_cycles,
        memory_bytes_per_cycle=AVX2_COSTS.memory_bytes_per_cycle / 2,
    )
    measured = measured_with(costs, algorithms, noise=0.01)
    found = fit_costs(measured, TARGET)
    assert found.memory_bytes_per_cycle < 0.75 * AVX2_COSTS.memory_bytes_per_cycle
    fitted = replace(TARGET, costs=found)  # costs that the measurements cannot tell apart share the change
    assert misfit(measured, fitted) < 0.2 * misfit(measured, TARGET)
    assert regret(measured, fitted) <= 0.02


def test_capacities_stay(algorithms):
    costs = replace(AVX2_COSTS, direct_factor=2 * AVX2_COSTS.direct_factor)
    found = asdict(fit_costs(measured_with(costs, algorithms), TARGET))
    for name, value in asdict(AVX2_COSTS).items():
        assert not isinstance(value, int) or found[name] == value


def test_costs_that_choose_worse_are_not_kept(algorithms, monkeypatch):
    measured = measured_with(AVX2_COSTS, algorithms, noise=0.3)
    values = iter([0.1, 0.0])  # of the fitted costs, then of those before
    monkeypatch.setattr(calibration, "regret", lambda *given: next(values))
    assert fit_costs(measured, TARGET) is TARGET.costs


# The file


@pytest.fixture
def counted(monkeypatch, tmp_path, algorithms):
    """``calibrated_costs`` for this processor as if it were unknown, and how often it measures."""
    monkeypatch.setenv(CALIBRATE_VARIABLE, "on")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibration, "FITTED_PROCESSORS", frozenset())
    monkeypatch.setattr(calibration, "host_isa", lambda: TARGET.isa)
    calls = []

    def measure(target, pool):
        calls.append(target)
        costs = replace(AVX2_COSTS, output_transform_cycles=2 * AVX2_COSTS.output_transform_cycles)
        return measured_with(costs, algorithms)

    return partial(calibrated_costs, TARGET.isa, 2, None, measure), calls


def test_a_processor_is_calibrated_once(counted):
    calibrate, calls = counted
    first, second = calibrate(), calibrate()
    assert first == second != AVX2_COSTS
    assert len(calls) == 1


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", '{"input_transform_cycles": 3}'),
        json.dumps(asdict(AVX2_COSTS) | {"direct_factor": "fast"}),
        json.dumps(asdict(AVX2_COSTS) | {"direct_factor": float("nan")}),
        json.dumps(asdict(AVX2_COSTS) | {"direct_factor": 1e9}),
        json.dumps(asdict(AVX2_COSTS) | {"direct_factor": -1.0}),
        json.dumps(asdict(AVX2_COSTS) | {"l2_budget_bytes": 1}),
    ],
)
def test_a_broken_file_is_measured_again(counted, content, monkeypatch):
    calibrate, calls = counted
    wanted = calibrate()
    monkeypatch.setattr(calibration, "read_entry", lambda *key: content.encode())
    assert calibrate() == wanted
    assert len(calls) == 2


def test_a_truncated_file_is_measured_again(counted, tmp_path):
    calibrate, calls = counted
    wanted = calibrate()
    (file,) = (tmp_path / "engine").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert calibrate() == wanted
    assert len(calls) == 2


def test_the_file_of_a_process_that_was_faster_is_used(counted, algorithms, monkeypatch):
    calibrate, calls = counted
    faster = replace(AVX2_COSTS, direct_factor=1.5)
    contents = iter([None, json.dumps(asdict(faster)).encode()])
    monkeypatch.setattr(calibration, "read_entry", lambda *key: next(contents))
    monkeypatch.setattr(calibration, "write_entry", lambda *entry: pytest.fail("written"))
    assert calibrate() == faster
    assert len(calls) == 1


@pytest.mark.parametrize("reason", ["off", "no cache", "known", "another processor"])
def test_is_left_out(counted, reason, monkeypatch):
    calibrate, calls = counted
    if reason == "off":
        monkeypatch.setenv(CALIBRATE_VARIABLE, "off")
    elif reason == "no cache":
        monkeypatch.setenv(CACHE_VARIABLE, "off")
    elif reason == "known":
        monkeypatch.setattr(calibration, "FITTED_PROCESSORS", {(TARGET.isa.name, TARGET.isa.cpu)})
    else:
        monkeypatch.setattr(calibration, "host_isa", lambda: GENERIC_ISAS["avx512"])
    assert calibrate() is None
    assert not calls


def test_a_compiled_model_says_that_it_is_calibrated(monkeypatch, tmp_path):
    monkeypatch.setenv(CALIBRATE_VARIABLE, "on")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibration, "FITTED_PROCESSORS", frozenset())
    calls, measure = [], calibration.measure_problems
    monkeypatch.setattr(calibration, "PROBLEMS", PROBLEMS[1:2])
    monkeypatch.setattr(calibration, "_TURNS", 1)
    monkeypatch.setattr(calibration, "measure_problems", lambda *given: calls.append(given) or measure(*given))
    small, large = (nn.Conv2d(width, width, 3, padding=1).eval() for width in (16, 128))
    assert "calibrated" not in repr(repvgg.engine.compile(small, (1, 16, 14, 14), 1))
    assert not calls
    compiled = repvgg.engine.compile(large, (1, 128, 14, 14), 1)
    assert len(calls) == 1
    assert repr(compiled).endswith(f"{host_isa().name}, 1 threads, calibrated costs>")


def test_without_calibration_the_size_of_a_network_does_not_matter(monkeypatch):
    monkeypatch.setenv(CALIBRATE_VARIABLE, "off")
    monkeypatch.setattr(repvgg.engine.CompiledModel, "_is_large", lambda *given: pytest.fail("shapes were inferred"))
    conv = nn.Conv2d(16, 16, 3, padding=1).eval()
    assert not repvgg.engine.compile(conv, (1, 16, 14, 14), 1).calibrated
