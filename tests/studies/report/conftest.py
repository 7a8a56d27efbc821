"""A report as the quickstart fills it, and one of 28 blocks."""

import math

import pytest

from repvgg.studies.report.schema import (
    Check,
    Data,
    Epoch,
    File,
    Model,
    NextCommand,
    Region,
    Report,
    Sample,
    Timing,
    Training,
    Unchanged,
)

SMALL = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1), (64, 128, 2))


def make_region(index, in_channels, out_channels, stride):
    branches = ("3x3 conv + BN", "1x1 conv + BN")
    if in_channels == out_channels and stride == 1:
        branches = (*branches, "identity + BN")
    weights = in_channels * out_channels
    return Region(
        name=f"blocks.{index}.conv",
        branches=branches,
        kernel=(3, 3),
        stride=(stride, stride),
        groups=1,
        in_channels=in_channels,
        out_channels=out_channels,
        params_before=10 * weights + 2 * len(branches) * out_channels,
        params_after=9 * weights + out_channels,
        error_made=4.2e-8,
        error_arriving=1.1e-7 * math.sqrt(index + 1),
    )


def make_check(subject, inputs, **changes):
    values = {
        "dtype": "float32",
        "relative_error": 2.9e-7,
        "absolute_error": 4.1e-6,
        "tolerance": 1.2e-5,
        "tolerance_origin": "100 roundings of float32",
        "passed": True,
        "reason": "the largest error is within the tolerance",
        "reference_error": 2.7e-7,
        "agree": 20,
        "total": 20,
    }
    return Check(subject, inputs, **{**values, **changes})


def make_timing(name, role, median, speedup):
    edges = (0.97 * median, 1.04 * median, speedup, 0.98 * speedup, 1.02 * speedup)
    return Timing(name, role, median, *edges, batch=64, rounds=30)


def make_report(plan=SMALL):
    confusion = [[2 if true == predicted else 0 for predicted in range(10)] for true in range(10)]
    confusion[8][8], confusion[8][1] = 1, 1
    checker = tuple(tuple(255 * ((row + column) % 2) for column in range(8)) for row in range(8))
    return Report(
        created="2026-08-03T14:05:00+00:00",
        command="repvgg quickstart --seed 7",
        seed=7,
        model=Model("repvgg_t0", 10, 1, 32, 203_050, 181_546, 11_873_024, 13_402_112),
        data=Data("handwritten digits", 1437, 20, tuple("0123456789")),
        training=Training(
            epochs=3,
            seconds=13.2,
            history=(Epoch(1, 1.9, 0.62), Epoch(2, 0.31, 0.91), Epoch(3, 0.042, 0.95)),
            accuracy=0.95,
            confusion=tuple(map(tuple, confusion)),
        ),
        regions=tuple(make_region(index, *row) for index, row in enumerate(plan)),
        left=(Unchanged("head", "a linear classifier"),),
        evidence=(
            make_check("plain form", "20 validation images"),
            make_check("plain form", "16 border-sensitive random images", dtype="float64", relative_error=5.1e-16),
            make_check("plain.onnx in ONNX Runtime", "20 validation images", reference_error=None),
        ),
        timings=(
            make_timing("train form", "train", 9.62e-3, 1.0),
            make_timing("conv and BN folded", "folded", 7.31e-3, 1.32),
            make_timing("plain form", "plain", 5.02e-3, 1.92),
            make_timing("plain form in ONNX Runtime", "runtime", 3.71e-3, 2.59),
        ),
        samples=(Sample(checker, 4, 4, 0.998), Sample(checker, 8, 1, 0.613)),
        files=(File("plain.onnx", 1_074_816, "the plain form for any ONNX runtime"),),
        next_commands=(NextCommand("repvgg list", "See all models."),),
        environment={"CPU": "some CPU, 2 cores", "torch": "2.11.0", "threads": "2", "python": "3.11.2"},
    )


@pytest.fixture(scope="session")
def report():
    return make_report()


@pytest.fixture(scope="session")
def long_report():
    return make_report(((3, 64, 2), *((64, 64, 1),) * 27))
