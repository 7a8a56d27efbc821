"""Studies in no time: tiny networks, and a stopwatch that takes the seconds that each network says."""

import torch
from torch import nn

from repvgg.studies.paper import TABLE_4, TABLE_5

#: The seconds that a call of each network takes: ten thousand times as slow as in the paper, whatever the batch.
SECONDS = {row.model: 10_000.0 / row.images_per_second for row in (*TABLE_4, *TABLE_5)}


def counted(table, models):
    """Counts that come to nobody's mind, and one that is not as printed."""
    row = {"params": 1_500_000, "macs": 2_500_000_000, "winograd_muls": 3_500_000_000, "differences": []}
    odd = {"differences": [{"column": "params", "reason": "cut in the paper", "explained": True}]}
    return {name: row | (odd if name == "resnet18" else {}) for name in models}


class Tiny(nn.Module):
    """Takes images of any size, and says how long it took."""

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


class Stopwatch:
    """Reads the seconds off the network; Ctrl-C, or another error, after so many reads."""

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
