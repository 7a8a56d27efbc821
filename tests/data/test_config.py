import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from repvgg.data import Augment, DataConfig
from repvgg.data.config import parse_uri
from repvgg.errors import UsageError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop": "centre"}, "'random-resized'"),
        ({"policy": "auto"}, "'trivialaugment'"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"crop_scale": (0.5, 0.1)}, "smaller first"),
        ({"crop_scale": (0.5, 1.5)}, "up to 1"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"flip": 1.1}, "probability"),
        ({"flip": 0.0, "alternate_flip": True}, r"flip in \(0, 1\)"),
        ({"erase": -0.1}, "probability"),
        ({"erase_size": 0.0}, "erase_size"),
        ({"randaugment_magnitude": 31}, "magnitude"),
        ({"randaugment_ops": 0}, "at least 1 operation"),
    ],
)
def test_augment_rejects_invalid_values(wrong, message):
    with pytest.raises(UsageError, match=message):
        Augment(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_size": 0}, "train_size"),
        ({"test_size": -3}, "test_size"),
        ({"crop_fraction": 0.0}, "crop_fraction"),
        ({"interpolation": "nearest"}, "'bicubic'"),
        ({"channels": 2}, "channels"),
        ({"mean": (0.5, 0.5)}, "one number per channel"),
        ({"channels": 3, "std": (1.0,)}, "one number per channel"),
        ({"std": (0.0,)}, "positive"),
        ({"workers": -1}, "workers"),
        ({"on_bad": "ignore"}, "'skip'"),
        ({"cache": "disk"}, "'memory'"),
    ],
)
def test_config_rejects_invalid_values(wrong, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**wrong)


def test_configs_are_frozen_values():
    assert DataConfig() == DataConfig(augment=Augment())
    with pytest.raises(FrozenInstanceError):
        DataConfig().uri = "fake:"


def test_importing_configs_does_not_import_torchvision():
    code = "import sys; from repvgg.data import Augment, DataConfig; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "repvgg.data.config" in modules
    assert not {"torchvision", "PIL", "datasets", "webdataset", "sklearn"} & set(modules)


@pytest.mark.parametrize(
    ("text", "scheme", "rest", "options"),
    [
        ("digits:", "digits", "", {}),
        ("imagefolder:/a?b=c/d:e", "imagefolder", "/a?b=c/d:e", {}),
        ("torchvision:CIFAR10:/data:download", "torchvision", "CIFAR10:/data:download", {}),
        ("hf:user/name:full?split=train&streaming", "hf", "user/name:full", {"split": "train", "streaming": ""}),
        ("webdataset:x-{0..3}.tar?classes=10", "webdataset", "x-{0..3}.tar", {"classes": "10"}),
        ("webdataset:x-?.tar", "webdataset", "x-?.tar", {}),
        ("webdataset:x-?.tar?length=5", "webdataset", "x-?.tar", {"length": "5"}),
    ],
)
def test_parse_uri(text, scheme, rest, options):
    uri = parse_uri(text)
    assert (uri.scheme, uri.rest, uri.options) == (scheme, rest, options)


@pytest.mark.parametrize("text", ["", "digits", "ftp:x", "/data/photos"])
def test_parse_uri_rejects_unknown_schemes(text):
    with pytest.raises(UsageError, match="imagefolder:PATH"):
        parse_uri(text)


def test_uri_options_are_checked():
    uri = parse_uri("hf:name?length=many&pages=3")
    with pytest.raises(UsageError, match="'pages'"):
        uri.check_options("length")
    with pytest.raises(UsageError, match="'many'"):
        uri.number("length")
    assert uri.number("classes") is None
