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
    data_config,
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
    from torch import nn

    from repvgg.deploy.int8 import RuntimeResult
    from repvgg.quantization import QuantizationReport, QuantizationSettings
    from repvgg.quantization.images import QuantizationImages


def quantize(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: OutFile,
    data: Annotated[str, tyro.conf.arg(metavar="URI")],
    model: Annotated[str | None, tyro.conf.arg(help_behavior_hint="", metavar="NAME")] = None,
    weights: OptionalFile = None,
    num_classes: Annotated[int | None, tyro.conf.arg(help_behavior_hint="", metavar="CLASSES")] = None,
    input_size: InputHeightWidth = None,
    calibration_images: int = 128,
    selection_images: int = 128,
    test_images: int = 512,
    granularity: Literal["auto", "per_channel", "per_tensor"] = "auto",
    weight_bits: Literal[7, 8] = 8,
    pair_bound: Annotated[bool, option("let adjacent weights be as large as they are.")] = True,
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
    signal-to-noise ratio of the logits, latency beside float32. Of a segmentation network: agreement of the pixels and
    mIoU. A file that agrees less than --min-agreement is not kept.

        repvgg quantize train.safetensors int8.onnx --data imagefolder:photos
        repvgg quantize plain.safetensors int8.onnx --data digits: --weight-bits 7
        repvgg quantize a0.safetensors int8.onnx --data digits: --report-only
        repvgg quantize pspnet.safetensors int8.onnx --data masks:street

    Args:
        source: where the model comes from.
        out: the file to write, which ends in .onnx.
        data: labelled images, such as imagefolder:PATH, or images with masks, such as masks:PATH; the training split
            calibrates, the validation split evaluates.
        model: refuse a checkpoint of any other model, a name from 'repvgg list'.
        weights: trained weights of a model by name or factory, safetensors or a torch file with a state_dict.
        num_classes: logits of a model by name (default: the model's own).
        input_size: height and width of the images (default: the model's own, or with masks those of the first
            validation image; others are resized).
        calibration_images: number of random training images to calibrate on.
        selection_images: number of other training images, on which granularity and bits are compared if they are not
            given.
        test_images: number of random validation images; 0 takes all.
        granularity: one scale for a weight tensor or for each output channel; auto: what does best on this CPU.
        weight_bits: 7 for runtimes whose kernels add products in 16 bits in another order than that of --pair-bound.
        pair_bound: keep the sums of adjacent weights within +-128: then 8-bit weights do not saturate in the integer
            kernels of CPUs without VNNI.
        ranges: how the range of an activation is chosen.
        equalize: see above.
        rounding_sweeps: passes of adaptive rounding; 0 rounds to the nearest.
        correct_biases: see above.
        min_agreement: share of the validation images, or of their pixels, whose class stays the same in every runtime.
        report_only: measure what each step is worth for this network, and write nothing but --html.
        html: with --report-only: write a page on every layer, its ranges, and what would help.
        overwrite: replace the file if it exists.
    """
    from repvgg.data import is_mask_uri
    from repvgg.quantization import QuantizationSettings, measure_steps
    from repvgg.quantization.images import open_quantization_images

    if out.suffix != ".onnx":
        raise UsageError(f"A quantized network is written as ONNX: end {str(out)!r} in .onnx.")
    if not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement is a share in [0, 1], got {min_agreement:g}.")
    if calibration_images < 1 or selection_images < 1 or test_images < 0:
        raise UsageError("--calibration-images and --selection-images are at least 1, and --test-images at least 0.")
    if html is not None and not report_only:
        raise UsageError("--html is the page of --report-only: give both.")
    if not report_only or html is not None:
        check_output_file(source, html or out, weights, overwrite=overwrite)
    settings = QuantizationSettings(
        weight_bits=weight_bits,
        pair_bound=pair_bound,
        ranges=ranges,
        equalize=equalize,
        rounding_sweeps=rounding_sweeps,
        correct_biases=correct_biases,
    )
    with busy("Loading"):
        network = load_network(source, model, weights, num_classes, input_size, None)
        images = open_quantization_images(
            data_config(network, data),
            network.shape if input_size or not is_mask_uri(data) else None,
            calibration=calibration_images,
            selection=selection_images if html is not None or (granularity == "auto" and not report_only) else 0,
            evaluation=test_images or None,
        )
    warn_of_random_weights(network, weights)
    plain, folded = plain_form(network, images.calibration[:2])
    plain = plain.float()
    _check_task(network, plain, images)
    write_line(f"made plain first: {folded_regions(folded)}" if folded.folded else "the network is plain")
    if report_only:
        with busy("Measuring"):
            steps = measure_steps(plain, images.calibration, images.evaluation)
        calibrated = f"calibrated on {len(images.calibration)} training images"
        write_line(f"simulated on {steps.nearest.images} validation images, {calibrated}:")
        for line in str(steps).splitlines():
            write_line(f"  {line}")
        if html is not None:
            write_page(html, network, plain, images, steps, settings, overwrite=overwrite)
        return
    with busy("Quantizing"):
        quantized, report = _quantize(plain, images, settings, granularity)
    for line in str(report).splitlines():
        write_line(line)
    results = _write(network, plain, quantized, report, out, images, min_agreement, overwrite)
    for result in results:
        write_line(str(result))
    write_line(f"wrote {out}: {out.stat().st_size / 1e6:.2f} MB")


def _check_task(network: Network, plain: nn.Module, images: QuantizationImages) -> None:
    """Raise UsageError if the network returns a class for images and the data has masks, or the other way round."""
    from repvgg.quantization.calibration import first_tensor, run

    is_map = first_tensor(run(plain, images.calibration[:1])).ndim == 4
    if is_map != (images.task == "segmentation"):
        found, wanted = ("masks", "labels") if images.task == "segmentation" else ("labels", "masks")
        raise UsageError(f"{network.source!r} needs images with {wanted}, but the data has {found}.")


def _quantize(
    plain: nn.Module,
    images: QuantizationImages,
    settings: QuantizationSettings,
    granularity: Literal["auto", "per_channel", "per_tensor"],
) -> tuple[nn.Module, QuantizationReport]:
    """Quantize, with the granularity that does best on this CPU if it is not given."""
    from repvgg.deploy.int8 import CHOICES, quantize_for_cpu
    from repvgg.quantization import Reference
    from repvgg.quantization import quantize as quantize_network

    if granularity != "auto":
        return quantize_network(plain, images.calibration, replace(settings, granularity=granularity))
    choices = [replace(one, weight_bits=settings.weight_bits, pair_bound=settings.pair_bound) for one in CHOICES]
    selection = Reference(plain, images.selection)
    quantized, report, tried = quantize_for_cpu(plain, images.calibration, selection, settings, choices)
    for name, quality in tried.items():
        write_line(f"tried in ONNX Runtime: {name}: {quality}")
    return quantized, report


def _write(
    network: Network,
    plain: nn.Module,
    quantized: nn.Module,
    report: QuantizationReport,
    out: Path,
    images: QuantizationImages,
    min_agreement: float,
    overwrite: bool,
) -> list[RuntimeResult]:
    """Write the file under a temporary name, evaluate it in each runtime, and keep it if it agrees."""
    from repvgg.deploy.int8 import evaluate_int8
    from repvgg.deploy.qdq import export_qdq
    from repvgg.quantization import Reference

    notes = {**network.notes_in_file, "quantization": str(report.settings)}
    with atomic_write(out, overwrite=overwrite) as part:
        with busy("Writing"):
            export_qdq(quantized, part, images.shape, overwrite=True, notes=notes)
        with busy("Evaluating"):
            results = evaluate_int8(part, Reference(plain, images.evaluation))
        decisions = "images" if images.task == "classification" else "pixels"
        worst = min(results, key=lambda result: result.quality.agreement)
        if worst.quality.agreement < min_agreement:
            raise ExportError(
                f"In {worst.runtime}, {worst.quality.agreement:.2%} of the {decisions} keep their class, fewer than "
                f"--min-agreement {min_agreement:g}: measure the steps with --report-only, or lower the limit. "
                "Nothing was written."
            )
    return results
