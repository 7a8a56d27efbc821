"""Tiny networks and a stopwatch with given seconds, so that a study of speed takes no time."""

import csv

import torch
from rich.console import Console
from torch import nn

from repvgg.studies import find_study
from repvgg.studies.base import run_study
from repvgg.studies.paper import TABLE_4, TABLE_5

#: Seconds of a call of each network: ten thousand times as slow as in the paper, at every batch size.
SECONDS = {row.model: 10_000.0 / row.images_per_second for row in (*TABLE_4, *TABLE_5)}


def run(name, folder, console=None, **chosen):
    study = find_study(name)
    settings = study.settings(**chosen)
    return run_study(study, settings, folder, command=f"repvgg study {name}", console=console or Console(quiet=True))


def read_rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fake_counts(table, models):
    """Counts of no real network, one of them not as printed."""
    counts = {"params": 1_500_000, "macs": 2_500_000_000, "winograd_muls": 3_500_000_000, "differences": []}
    different = {"differences": [{"column": "params", "reason": "cut in the paper", "explained": True}]}
    return {name: counts | (different if name == "resnet18" else {}) for name in models}


class Tiny(nn.Module):
    """Accepts images of any size; ``seconds`` is what :class:`FakeStopwatch` reads, None runs out of memory."""

    def __init__(self, seconds, name=""):
        super().__init__()
        self.seconds, self.name = seconds, name
        self.weight = nn.Parameter(torch.ones(1))

    def __str__(self):
        return self.name

    def forward(self, x):
        if self.seconds is None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return x.mean() * self.weight


class FakeStopwatch:
    """Reads the seconds off the network; raises Ctrl-C, or another error, after that many reads."""

    def __init__(self, reads=None, error=KeyboardInterrupt, seconds=lambda model: model.seconds):
        self.left, self.error, self.seconds = reads, error, seconds
        self.calls = {}

    def __call__(self, call, calls):
        if self.left is not None:
            if not self.left:
                raise self.error
            self.left -= 1
        call()
        model = call.func
        self.calls[str(model)] = self.calls.get(str(model), 0) + 1
        return calls * self.seconds(model)
