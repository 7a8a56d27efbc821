import pytest
import torch
from torch import nn

from repvgg._contexts import PRECISION_NODES, precision_of
from repvgg.errors import UsageError
from repvgg.measure import RunSettings


def test_models_and_images_stand_where_the_setting_says():
    setting = RunSettings(dtype="bfloat16", channels_last=True)
    model, images = setting.place(nn.Conv2d(3, 4, 3)), setting.images(2, (3, 8, 9))
    assert (model.weight.dtype, images.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (2, 3, 8, 9)
    assert not model.training
    torch.testing.assert_close(images, setting.images(2, (3, 8, 9)), rtol=0, atol=0)


def test_threads_for_a_while():
    before = torch.get_num_threads()
    with RunSettings(threads=before + 1).applied():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": -1}, {"dtype": "tf32"}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(UsageError):
        RunSettings(**options)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device here: use --device cpu"), RunSettings(device="cuda").applied():
        pass


def switches():
    """All that says how float32 is computed."""
    flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    return *flags, *map(precision_of, PRECISION_NODES)


@pytest.mark.parametrize(("dtype", "precision"), [("tf32", "high"), ("float32", "highest"), ("float16", "highest")])
def test_tf32_only_where_asked_for(dtype, precision, monkeypatch):
    """The switches are there without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    setting = RunSettings(device="cuda", dtype=dtype)
    before = switches()
    with setting.applied():
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (dtype == "tf32")
        assert torch.backends.cudnn.benchmark
    assert switches() == before
    assert setting.torch_dtype is (torch.float16 if dtype == "float16" else torch.float32)


def test_compiled_models_are_wrapped_by_torch_compile(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: nn.Sequential(model))
    assert isinstance(RunSettings(compile=True).place(nn.ReLU()), nn.Sequential)
    assert isinstance(RunSettings().place(nn.ReLU()), nn.ReLU)
