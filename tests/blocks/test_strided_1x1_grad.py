"""Training works where oneDNN's strided 1x1 weight gradient corrupts memory; each network has its own process."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("strided_1x1_grad_script.py")


def run_script(model, pixels, steps):
    command = [sys.executable, str(SCRIPT), model, str(pixels), str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 6


def test_small_network_with_every_kind_of_layer():
    run_script("gated", 160, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "pixels"),
    [
        *((model, pixels) for model in ("repvgg_t0", "repvgg_t1", "repvgg_t2") for pixels in (32, 160)),
        *(("repvgg_a0", pixels) for pixels in (96, 160)),  # at 32 its last batch norms have two values per channel
    ],
)
def test_registered_models(model, pixels):
    run_script(model, pixels, 4)
