"""The integers of a run of quantization-aware training: as an ONNX file, run beside what was simulated."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from repvgg._progress import busy
from repvgg.cli._output import write_line, write_warning
from repvgg.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repvgg.deploy.int8 import RuntimeResult
    from repvgg.quantization import QatNetwork, Reference
    from repvgg.training import TrainConfig

_IMAGE_BYTES = 2**28  # of validation images in memory
_RUNTIME_IMAGES = 512  # that are run in the runtimes


def write_int8(folder: Path, network: QatNetwork, config: TrainConfig) -> None:
    """Write ``int8.onnx`` of a finished run, and compare it with the simulation and with the checkpoint before it."""
    from repvgg.deploy.qdq import export_qdq
    from repvgg.models import load
    from repvgg.quantization import Reference, in_batches
    from repvgg.training.run_folder import INT8_ONNX_FILE, PLAIN_FILE

    loaded = load(folder / PLAIN_FILE)
    about = loaded.metadata
    integers, plain = network.to_integers(), loaded.model.eval()
    found = _validation_images(config)
    if found is not None and config.init is not None:
        _print_beside_checkpoint(network, load(config.init).model.eval(), *found)
    path = folder / INT8_ONNX_FILE
    try:
        with busy("Writing"):
            shape = (about.in_channels, about.input_size, about.input_size)
            notes = {**about.to_header(), "quantization": f"trained: {config.qat.settings}"}
            export_qdq(integers, path, shape, overwrite=True, notes=notes)
    except MissingDependencyError as error:  # the integers are in int8.safetensors as well
        write_warning(f"no {INT8_ONNX_FILE} was written: {error}")
        return
    if found is None:
        return
    images, labels = found
    simulated = Reference(integers, in_batches(images[:_RUNTIME_IMAGES], labels[:_RUNTIME_IMAGES]))
    try:
        with busy("Evaluating"):
            results = _evaluate(path, simulated, plain)
    except MissingDependencyError as error:
        write_warning(f"{INT8_ONNX_FILE} was written and not run: {error}")
        return
    for result in results:
        write_line(f"  {INT8_ONNX_FILE} beside the simulated integers, {result}")


def _evaluate(path: Path, simulated: Reference, plain: nn.Module) -> list[RuntimeResult]:
    """Compare the file with what was simulated; its latency is beside that of the float network."""
    from repvgg.deploy import export_onnx
    from repvgg.deploy.int8 import evaluate_int8

    with tempfile.TemporaryDirectory() as folder:
        float_file = Path(folder) / "float.onnx"
        export_onnx(plain, float_file, simulated.shape)
        return evaluate_int8(path, simulated, float_file=float_file)


def _validation_images(config: TrainConfig) -> tuple[Tensor, Tensor] | None:
    """Return validation images and their labels, as many as fit into memory; None of masks and of streams."""
    from repvgg.data import ImageData, open_data

    data = open_data(config.data, seed=config.seed)
    if not isinstance(data, ImageData) or not data.num_val:
        return None
    channels, height, width = data.test_shape
    most = max(_RUNTIME_IMAGES, _IMAGE_BYTES // (4 * channels * height * width))
    return data.val_images(range(min(data.num_val, most)))


def _print_beside_checkpoint(network: nn.Module, before: nn.Module, images: Tensor, labels: Tensor) -> None:
    from repvgg.quantization import compare_outputs
    from repvgg.quantization.calibration import run_in_batches

    reference, simulated = run_in_batches(before, images), run_in_batches(network, images)
    if reference.shape == simulated.shape:  # not of a new classifier
        accuracy = compare_outputs(reference, simulated, labels).accuracy
        write_line(f"  simulated integers beside the checkpoint before, {len(images):,} images: {accuracy}")
