"""Counts of every architecture at 224x224 and 1000 classes."""

import pytest
import torch

from repvgg.measure import count
from repvgg.models import create_model

# name: parameters of the train form, parameters, GMACs and Winograd GMULs of the plain form
GOLDEN = {
    "repvgg_a0": (9108968, 8309384, "1.361", "0.747"),
    "repvgg_a1": (14092264, 12789864, "2.364", "1.272"),
    "repvgg_a2": (28210600, 25499944, "5.117", "2.660"),
    "repvgg_b0": (15817960, 14339048, "3.058", "1.580"),
    "repvgg_b1": (57415016, 51829480, "11.815", "5.907"),
    "repvgg_b1g2": (45782376, 41360104, "8.810", "4.571"),
    "repvgg_b1g4": (39966056, 36125416, "7.307", "3.903"),
    "repvgg_b2": (89022376, 80315112, "18.377", "9.144"),
    "repvgg_b2g2": (70846376, 63956712, "13.680", "7.057"),
    "repvgg_b2g4": (61758376, 55777512, "11.332", "6.013"),
    "repvgg_b3": (123085288, 110960872, "26.209", "12.914"),
    "repvgg_b3g2": (96911848, 87404776, "19.446", "9.909"),
    "repvgg_b3g4": (83825128, 75626728, "16.064", "8.406"),
    "repvgg_d2se": (133334836, 120387572, "32.830", "15.569"),
    "repvggplus_l2pse": (146062864, 127151960, "32.836", "15.576"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    train_params, plain_params, gmacs, winograd_gmuls = GOLDEN[name]
    with torch.device("meta"):
        train, plain = create_model(name), create_model(name, plain=True)
    counts = count(plain)
    assert counts.params == plain_params
    assert f"{counts.macs / 1e9:.3f}" == gmacs
    assert f"{counts.winograd_muls / 1e9:.3f}" == winograd_gmuls
    assert counts.unknown == ()
    plain_macs = counts.macs
    counts = count(train)
    assert counts.params == train_params
    assert counts.macs > plain_macs, "three branches multiply more than one convolution"
    assert counts.unknown == ()
