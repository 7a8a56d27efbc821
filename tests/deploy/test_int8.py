import copy

import onnx
import pytest

import repvgg
from repvgg.deploy import OnnxRunner
from repvgg.deploy.int8 import RuntimeResult, evaluate_int8, quantize_for_cpu
from repvgg.deploy.qdq import export_qdq
from repvgg.errors import UsageError
from repvgg.quantization import Quality, QuantizationSettings, Reference, in_batches, sqnr
from tests.quantization.networks import Chain, Residual, images, random_


@pytest.mark.parametrize(("network", "granularity"), [(Chain, "per_channel"), (Residual, "per_tensor")])
def test_the_file_computes_what_the_simulation_does(network, granularity, tmp_path):
    model, calibration, test = random_(network()), images(16), images(5, seed=9)
    settings = QuantizationSettings(granularity, rounding_sweeps=0)
    quantized, _ = repvgg.quantize(model, calibration, settings)
    written = export_qdq(quantized, tmp_path / "int8.onnx", tuple(test.shape[1:]))
    simulated = quantized(test)
    for optimize in (False, True):
        run = OnnxRunner(written.path, optimize=optimize)
        # Scales are multiplied in another order, so that a sum halfway between two integers may go either way.
        assert sqnr(simulated, run(test)) > sqnr(model(test), simulated) + 6
        assert run(test[:1]).shape == simulated[:1].shape  # the batch size is open


def test_weights_are_stored_as_integers(tmp_path):
    quantized, _ = repvgg.quantize(random_(Chain()), images(4))
    file = export_qdq(quantized, tmp_path / "int8.onnx", tuple(images().shape[1:])).path
    tensors = onnx.load(file).graph.initializer
    # That of PReLU has four axes too, the first of length 1.
    stored = {one.name: one.data_type for one in tensors if len(one.dims) == 4 and one.dims[0] > 1}
    assert len(stored) >= 5
    assert set(stored.values()) == {onnx.TensorProto.INT8}


def test_a_flipped_bit_in_the_weights_shows(tmp_path):
    model, test = random_(Chain()), images(6, seed=9)
    reference = Reference(model, in_batches(test))
    quantized, _ = repvgg.quantize(model, images(16))
    broken = copy.deepcopy(quantized)
    loudest = int(model.body(test).abs().mean(0).argmax())
    broken.head.weight_integers[0, loudest] ^= 64
    results = [
        evaluate_int8(export_qdq(one, tmp_path / f"{name}.onnx", reference.shape).path, reference, rounds=1)
        for name, one in (("right", quantized), ("broken", broken))
    ]
    right, wrong = (one[0] for one in results)
    assert right.runtime == "ONNX Runtime"
    assert right.quality.sqnr > wrong.quality.sqnr + 3
    assert right.latency.milliseconds > 0
    assert right.latency.float_milliseconds > 0
    assert "times as fast" in str(right)
    assert not right.saturates  # pairs of weights are bounded


def test_saturation_is_told_from_quantization():
    found = Quality(17.9, 0.907, 720)
    saturated = RuntimeResult("ONNX Runtime", found, saturation=3.8)
    assert saturated.saturates
    assert "saturate on this CPU, 3.8 dB are lost" in str(saturated)
    assert not RuntimeResult("ONNX Runtime", found, saturation=0.2).saturates
    assert not RuntimeResult("OpenVINO", found).saturates


def test_the_best_choice_for_this_cpu_is_taken():
    model, calibration, test = random_(Chain()), images(16), images(8, seed=9)
    settings = QuantizationSettings(rounding_sweeps=0)
    choices = [QuantizationSettings("per_tensor", 4), QuantizationSettings("per_channel", 8)]
    _, report, tried = quantize_for_cpu(model, calibration, Reference(model, in_batches(test)), settings, choices)
    assert list(tried) == ["4-bit weights per tensor", "8-bit weights per channel in bounded pairs"]
    assert (report.settings.granularity, report.settings.weight_bits) == ("per_channel", 8)
    assert report.settings.rounding_sweeps == 0


def test_a_float_network_has_no_qdq_form(tmp_path):
    with pytest.raises(UsageError, match=r"call repvgg\.quantize first"):
        export_qdq(random_(Chain()), tmp_path / "int8.onnx", tuple(images().shape[1:]))
