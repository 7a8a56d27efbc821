"""``repvgg quantize``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from repvgg._files import atomic_write
from repvgg._progress import busy
from repvgg.cli._network import (
    Network,
    check_output_file,
    folded_regions,
    load_network,
    plain_form,
    warn_of_random_weights,
)
from repvgg.cli._options import InputHeightWidth, OptionalFile, OutFile, option
from repvgg.cli._output import write_line
from repvgg.cli._quantizability import write_page
from repvgg.errors import ExportError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repvgg.data import ImageData
    from repvgg.deploy.int8 import RuntimeResult
    from repvgg.quantization import QuantizationReport, QuantizationSettings

_SEED = 0  # of the choice of images


def quantize(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: OutFile,
    data: Annotated[str, tyro.conf.arg(metavar="URI")],
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    weights: OptionalFile = None,
    num_classes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="CLASSES")] = None,
    input_size: InputHeightWidth = None,
    calibration_images: int = 128,
    test_images: int = 512,
    granularity: Literal["auto", "per_channel", "per_tensor"] = "auto",
    weight_bits: Annotated[Literal[7, 8] | None, tyro.conf.arg(help_behavior_hint="")] = None,
    ranges: Literal["mse", "percentile", "minmax"] = "mse",
    equalize: Annotated[bool, option("leave the scales of channels as they are.")] = True,
    rounding_sweeps: int = 2,
    correct_biases: Annotated[bool, option("leave the biases as they are.")] = True,
    min_agreement: float = 0.99,
    report_only: bool = False,
    html: OptionalFile = None,
    overwrite: bool = False,
) -> None:
    """Quantize any network to 8-bit integers, compare it with the float network, and write it as an ONNX file (QDQ).

    SOURCE is as for 'repvgg convert'. The network is made plain; its channels are equalized, which does not change what
    it computes; ranges of activations are calibrated on training images; weights are rounded by the error of the
    layer's output; and the bias of each layer is corrected in the order of execution.

    The file is run in ONNX Runtime, and in OpenVINO if it is installed, on validation images: agreement of the top-1
    classes with the float network, paired difference of the accuracies with its 95 % confidence interval,
    signal-to-noise ratio of the logits, latency. A file that agrees in fewer images than --min-agreement is not kept.

        repvgg quantize train.safetensors int8.onnx --data imagefolder:photos
        repvgg quantize plain.safetensors int8.onnx --data digits: --weight-bits 7
        repvgg quantize plain.safetensors int8.onnx --data digits: --report-only --html report.html

    Args:
        source: where the model comes from.
        out: the file to write, which ends in .onnx.
        data: labelled images, such as imagefolder:PATH; the training split calibrates, the validation split evaluates.
        model: refuse a checkpoint of any other model, a name from 'repvgg list'.
        weights: trained weights of a model by name or factory, safetensors or a torch file with a state_dict.
        num_classes: logits of a model by name (default: the model's own).
        input_size: height and width of the images, which are equal (default: the model's own).
        calibration_images: number of random training images; they are in memory at once, with their feature maps.
        test_images: number of random validation images; 0 takes all.
        granularity: one scale for a weight tensor or for each output channel; auto: what does best on this CPU.
        weight_bits: 7 keeps the integer kernels of CPUs without VNNI from saturating (default: what does best on this
            CPU if --granularity is auto, otherwise 8).
        ranges: how the range of an activation is chosen.
        equalize: see above.
        rounding_sweeps: passes of adaptive rounding; 0 rounds to the nearest.
        correct_biases: see above.
        min_agreement: share of the validation images whose top-1 class stays the same in every runtime.
        report_only: measure what each step is worth for this network, and write nothing but --html.
        html: with --report-only: write a page on every layer, its ranges, and what would help.
        overwrite: replace the file if it exists.
    """
    from repvgg.quantization import QuantizationSettings, measure_steps

    if out.suffix != ".onnx":
        raise UsageError(f"A quantized network is written as ONNX: end {str(out)!r} in .onnx.")
    if not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement is a share in [0, 1], got {min_agreement:g}.")
    if calibration_images < 1 or test_images < 0:
        raise UsageError("--calibration-images is at least 1, and --test-images at least 0.")
    if html is not None and not report_only:
        raise UsageError("--html is the page of --report-only: give both.")
    if not report_only or html is not None:
        check_output_file(source, html or out, weights, overwrite=overwrite)
    settings = QuantizationSettings(
        ranges=ranges, equalize=equalize, rounding_sweeps=rounding_sweeps, correct_biases=correct_biases
    )
    with busy("Loading"):
        network = load_network(source, model, weights, num_classes, input_size, None)
        calibration, _ = _images(network, data, "train", calibration_images)
        images, labels = _images(network, data, "val", test_images or None)
    warn_of_random_weights(network, weights)
    plain, folded = plain_form(network, calibration[:2])
    plain = plain.float()
    write_line(f"made plain first: {folded_regions(folded)}" if folded.folded else "the network is plain")
    if report_only:
        with busy("Measuring"):
            steps = measure_steps(plain, calibration, images, labels)
        write_line(f"simulated on {len(images)} validation images, calibrated on {len(calibration)} training images:")
        for line in str(steps).splitlines():
            write_line(f"  {line}")
        if html is not None:
            write_page(html, network, plain, calibration, images, steps, settings, overwrite=overwrite)
        return
    with busy("Quantizing"):
        quantized, report = _quantize(plain, calibration, images, settings, granularity, weight_bits)
    for line in str(report).splitlines():
        write_line(line)
    results = _write(network, plain, quantized, report, out, (images, labels), min_agreement, overwrite)
    for result in results:
        write_line(str(result))
    write_line(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB")


def _images(network: Network, uri: str, split: Literal["train", "val"], count: int | None) -> tuple[Tensor, Tensor]:
    """Return ``count`` random images of a split, or all, as the network takes them, and their labels."""
    import torch

    from repvgg.data import DataConfig, open_image_evaluation_data

    channels, height, width = network.shape
    if height != width:
        raise UsageError(f"Data sets give square images: set --input-size N N, the network has {height} x {width}.")
    about = network.metadata
    config = DataConfig(
        uri=uri,
        train_size=height,
        test_size=height,
        channels=1 if channels == 1 else 3,
        mean=about.mean or None if about else None,
        std=about.std or None if about else None,
    )
    data: ImageData = open_image_evaluation_data(config, split)
    if data.num_val is None:
        found: list[tuple[Tensor, Tensor]] = []
        for batch in data.val_batches(64):
            found.append(batch)
            if count is not None and sum(len(labels) for _, labels in found) >= count:
                break
        images, labels = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    else:
        order = torch.randperm(data.num_val, generator=torch.Generator().manual_seed(_SEED))
        images, labels = data.val_images(order[:count])
    return data.prepare(images), labels


def _quantize(
    plain: nn.Module,
    calibration: Tensor,
    images: Tensor,
    settings: QuantizationSettings,
    granularity: Literal["auto", "per_channel", "per_tensor"],
    bits: Literal[7, 8] | None,
) -> tuple[nn.Module, QuantizationReport]:
    """Quantize, with the granularity and bits of weights that do best on this CPU where they are not given."""
    from repvgg.deploy.int8 import CHOICES, quantize_for_cpu
    from repvgg.quantization import quantize as quantize_network

    if granularity != "auto":
        fixed = replace(settings, granularity=granularity, weight_bits=bits or 8)
        return quantize_network(plain, calibration, fixed)
    choices = [one for one in CHOICES if bits in (None, one.weight_bits)]
    quantized, report, tried = quantize_for_cpu(plain, calibration, images, settings, choices)
    for name, quality in tried.items():
        write_line(f"tried in ONNX Runtime: {name}: {quality}")
    return quantized, report


def _write(
    network: Network,
    plain: nn.Module,
    quantized: nn.Module,
    report: QuantizationReport,
    out: Path,
    test: tuple[Tensor, Tensor],
    min_agreement: float,
    overwrite: bool,
) -> list[RuntimeResult]:
    """Write the file under a temporary name, evaluate it in each runtime, and keep it if it agrees."""
    from repvgg.deploy.int8 import evaluate_int8
    from repvgg.deploy.qdq import export_qdq

    images, labels = test
    notes = {**network.notes_in_file, "quantization": str(report.settings)}
    with atomic_write(out, overwrite=overwrite) as part:
        with busy("Writing"):
            shape = (images.shape[1], images.shape[2], images.shape[3])
            export_qdq(quantized, part, shape, overwrite=True, notes=notes)
        with busy("Evaluating"):
            results = evaluate_int8(part, plain, images, labels)
        worst = min(results, key=lambda result: result.quality.agreement)
        if worst.quality.agreement < min_agreement:
            raise ExportError(
                f"In {worst.runtime}, {worst.quality.agreement:.2%} of the images keep their class, fewer than "
                f"--min-agreement {min_agreement:g}: measure the steps with --report-only, or lower the limit. "
                "Nothing was written."
            )
    return results
