"""What the tests of pages share: a stand-in for onnxruntime-web, small networks, photographs."""

import tarfile
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import nn

from repvgg.deploy.onnxruntime_web import SCRIPT, WASM
from repvgg.deploy.targets import ExportRequest

SCRIPT_TEXT = b"/*!\n * ONNX Runtime Web v9.9.9\n */\nexport {};\n"
WASM_BYTES = b"\0asm\1\0\0\0 and functions"


def runtime_folder(folder):
    """Write a package that has the form of onnxruntime-web and runs nothing."""
    dist = folder / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    (dist / SCRIPT).write_bytes(SCRIPT_TEXT)
    (dist / WASM).write_bytes(WASM_BYTES)
    return dist.parent


def package_of(folder, path):
    """Write the file that ``npm pack`` makes of a package."""
    with tarfile.open(path, "w:gz") as package:
        package.add(folder, "package")
    return path


def classifier(channels=3, classes=7):
    torch.manual_seed(1)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers = nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*layers, *pool, nn.Linear(16, classes)).eval()


def segmenter(classes=5):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, classes, 5, 1, 2)).eval()


def request(model, out, shape, **options):
    return ExportRequest(model, model, out, shape, overwrite=True, notes={"source": "net.py:make"}, options=options)


def photographs():
    """JPEG files that scikit-learn includes, 640 x 427."""
    return [Path(name) for name in load_sample_images().filenames]
