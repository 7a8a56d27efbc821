import pytest
import torch
from torch import nn

from repvgg._contexts import PRECISION_NODES, precision_of
from repvgg.errors import UsageError
from repvgg.measure import RunSettings


def test_place_and_images_follow_the_settingss():
    settings = RunSettings(dtype="bfloat16", channels_last=True)
    model, images = settings.place(nn.Conv2d(3, 4, 3)), settings.images(2, (3, 8, 9))
    assert (model.weight.dtype, images.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (2, 3, 8, 9)
    assert not model.training
    torch.testing.assert_close(images, settings.images(2, (3, 8, 9)), rtol=0, atol=0)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with RunSettings(threads=before + 1).applied():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}, {"dtype": "tf32"}])
def test_invalid_settingss_are_refused(options):
    with pytest.raises(UsageError):
        RunSettings(**options)


def test_missing_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device here: use --device cpu"), RunSettings(device="cuda").applied():
        pass


def precision_flags():
    """Return every flag that decides how float32 is computed."""
    flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    return *flags, *map(precision_of, PRECISION_NODES)


@pytest.mark.parametrize(("dtype", "precision"), [("tf32", "high"), ("float32", "highest"), ("float16", "highest")])
def test_tf32_only_on_request(dtype, precision, monkeypatch):
    """The flags exist without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    settings = RunSettings(device="cuda", dtype=dtype)
    before = precision_flags()
    with settings.applied():
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (dtype == "tf32")
        assert torch.backends.cudnn.benchmark
    assert precision_flags() == before
    assert settings.torch_dtype is (torch.float16 if dtype == "float16" else torch.float32)


def test_compiled_models_are_wrapped_by_torch_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: nn.Sequential(model))
    assert isinstance(RunSettings(compile=True).place(nn.ReLU()), nn.Sequential)
    assert isinstance(RunSettings().place(nn.ReLU()), nn.ReLU)
