"""An exported C library beside ONNX Runtime: size of the files, and time to the first output in a new process.

    python benchmarks/first_output.py                                  repvgg_a0 and resnet18, one image, 2 threads
    python benchmarks/first_output.py --models repvgg_a2 --rounds 21

Each round starts a process for each of three: the example program of the C library, from its start to its end; the
library, from ``model_create`` to the first output; ONNX Runtime in Python on the same plain network as an ONNX file,
from the creation of the session to the first output, without the import of its module, which is printed beside it.
Files are in the page cache. Medians with quartiles over the rounds. Sizes: what has to be shipped; the library, or the
ONNX file and the shared library of ONNX Runtime.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import repvgg
from repvgg.deploy import export_onnx
from repvgg.deploy.c_library import export_c
from repvgg.engine.library.targets import cpu_target
from repvgg.models import resolve

SIZE = 224
ONNX_RUNTIME = """
import sys, time
start = time.perf_counter()
import numpy as np
import onnxruntime as ort
imported = time.perf_counter()
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
image = np.zeros((1, 3, int(sys.argv[3]), int(sys.argv[3])), np.float32)
session.run(None, {session.get_inputs()[0].name: image})
print(1e3 * (time.perf_counter() - imported), 1e3 * (imported - start))
"""


def plain_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    library = "repvgg" if name.startswith("repvgg") else "torchvision"
    plain, _ = repvgg.reparameterize(resolve(f"{library}:{name}").model.eval(), torch.zeros(1, 3, SIZE, SIZE))
    return plain


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def measure(name: str, rounds: int, threads: int, folder: Path) -> None:
    plain = plain_model(name)
    done = export_c(plain, plain, folder / "c", [(3, SIZE, SIZE)], threads=threads)
    onnx = folder / "plain.onnx"
    export_onnx(plain, onnx, (3, SIZE, SIZE))
    program = folder / "example"
    sources = [str(folder / "c" / file) for file in ("example.c", "libmodel.a")]
    subprocess.run([str(cpu_target("native").compiler), "-O2", *sources, "-pthread", "-o", str(program)], check=True)
    image, out = folder / "image", folder / "out"
    image.write_bytes(np.zeros((1, 3, SIZE, SIZE), np.float32).tobytes())
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        start = time.perf_counter()
        output_of([str(program), str(image), str(out), "1", str(threads)])
        times.setdefault("C program, whole process", []).append(1e3 * (time.perf_counter() - start))
        first = re.search(r"first output after ([\d.]+) ms", output_of([str(program)]))
        assert first
        times.setdefault("C library, first output", []).append(float(first[1]))
        session, imported = map(
            float, output_of([sys.executable, "-c", ONNX_RUNTIME, str(onnx), str(threads), str(SIZE)]).split()
        )
        times.setdefault("ONNX Runtime, first output", []).append(session)
        times.setdefault("ONNX Runtime, import", []).append(imported)
    print(f"{name}, {SIZE}x{SIZE}, {threads} threads, {done.target.name}, error {done.evidence.relative:.1e}")
    for what, values in times.items():
        low, median, high = np.percentile(values, [25, 50, 75])
        print(f"  {what:28} {median:8.1f} ms  ({low:.1f}-{high:.1f})")
    import onnxruntime

    runtime = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    sizes = {
        "libmodel.so": (folder / "c" / "libmodel.so").stat().st_size,
        "of which weights": done.weights_bytes,
        "example, linked statically": program.stat().st_size,
        "plain.onnx": onnx.stat().st_size,
        runtime.name: runtime.stat().st_size,
    }
    for what, size in sizes.items():
        print(f"  {what:28} {size / 2**20:8.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["repvgg_a0", "resnet18"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, options.rounds, options.threads, Path(folder))


if __name__ == "__main__":
    main()
