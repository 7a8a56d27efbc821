"""Training survives where oneDNN's strided 1x1 weight gradient corrupts memory; each network has a process."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("strided_1x1_grad_script.py")


def survives(row, pixels, steps):
    command = [sys.executable, str(SCRIPT), row, str(pixels), str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 6


def test_a_small_network_of_every_kind_of_part():
    survives("gated", 160, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "pixels"),
    [
        *((row, pixels) for row in ("repvgg_t0", "repvgg_t1", "repvgg_t2") for pixels in (32, 160)),
        *(("repvgg_a0", pixels) for pixels in (96, 160)),  # at 32 its last norms see two numbers a channel
    ],
)
def test_rows_of_the_table(row, pixels):
    survives(row, pixels, 4)
