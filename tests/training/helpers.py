"""Shared by the tests of training: a tiny data set, a tiny network, and processes that can be killed."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from repvgg.data import Augment, DataConfig, open_data
from repvgg.models import ModelSpec, Stage, create_model
from repvgg.training import OptimConfig, TrainConfig, seeded

SPEC = ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(1, 8), Stage(2, 16)), auxiliary=(0,))
DATA = DataConfig(uri="fake:96x4", train_size=8, augment=Augment(flip=0.5))
CONFIG = TrainConfig(
    model="repvgg_t0",
    recipe="test",
    epochs=2,
    batch_size=16,
    data=DATA,
    optim=OptimConfig(lr=0.05, lr_batch=None, weight_decay=1e-3, warmup_epochs=0.5),
    label_smoothing=0.1,
    threads=1,
    accelerator="cpu",
    dry_run=False,
)


def opened(config=CONFIG):
    return open_data(config.data, seed=config.seed)


def tiny(seed=0, num_classes=4, in_channels=3, spec=SPEC):
    with seeded(seed):
        return create_model(spec, num_classes, in_channels)


def fingerprint(model):
    """A hash of the bits of all parameters and buffers with their names."""
    parts = [name.encode() + value.contiguous().numpy().tobytes() for name, value in sorted(model.state_dict().items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def outcome(folder):
    """Everything in a run folder that must not depend on interruptions; times may differ."""
    last = torch.load(folder / "last.ckpt", weights_only=True)
    (history,) = (state["records"] for name, state in last["callbacks"].items() if "History" in name)
    timeless = [{name: record[name] for name in record if name not in _TIMES} for record in history]
    result = {f"{name}.safetensors": load_file(folder / f"{name}.safetensors") for name in ("train", "plain", "best")}
    lines = (folder / "log.csv").read_text().splitlines()
    result |= {"history": timeless, "log": [line.split(",")[:5] for line in lines]}
    return result | {name: last[name] for name in _SAVED if name in last}


_TIMES = ("seconds", "images_per_second")
_SAVED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


class Server:
    """Runs ``repvgg`` in processes forked from one that has everything imported; see ``cli_server.py``."""

    def __init__(self, log):
        self.log = Path(log)
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("cli_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *argv, stop=None):
        """Return the exit code of ``repvgg`` (minus the number of the signal that ended it), and its output."""
        return self._job(argv=[str(argument) for argument in argv], stop=stop)

    def ranks(self, number, out):
        """Run ``ddp_script.both`` in ``number`` processes; return exit code and output."""
        return self._job(ranks=number, out=str(out))

    def _job(self, **job):
        start = self.log.stat().st_size if self.log.exists() else 0
        self._process.stdin.write(json.dumps(job | {"log": str(self.log)}) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return code, self.log.read_bytes()[start:].decode()

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def with_workers(config, workers):
    return replace(config, data=replace(config.data, workers=workers))
