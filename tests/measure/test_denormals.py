import pytest
import torch
from torch import nn

from repvgg.errors import UsageError
from repvgg.measure import count_denormals
from repvgg.measure.denormals import denormals_in, flushed_denormals

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_normal_number_of_each_dtype(dtype):
    tiny, least = torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal
    assert tiny == least
    values = torch.tensor([0.0, -0.0, 1.0, tiny, -tiny, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    assert denormals_in(values) == 0
    assert denormals_in(values / 2) == 2
    assert denormals_in(torch.nextafter(values[:1].float(), values[2:3].float()).to(dtype)) == (dtype is torch.float32)


def test_any_memory_layout_and_integers():
    tiny = torch.full((2, 3, 4, 5), 1e-40)
    assert denormals_in(tiny.to(memory_format=torch.channels_last)) == denormals_in(tiny.permute(3, 1, 0, 2)) == 120
    assert denormals_in(torch.zeros(3, dtype=torch.int32)) == 0


def test_weights_and_activations_by_hand():
    """One of three weights is denormal. 8 of 12 products are denormal, 4 of 12 outputs of the ReLU."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU()).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1e-30, -1e-30, 1e-39]).view(3, 1, 1, 1))
    images = torch.full((1, 1, 2, 2), 1e-9)
    images[..., 0] = 1e-8
    found = count_denormals(model, images)
    assert (found.weights, found.weights_total) == (1, 3)
    assert (found.activations, found.activations_total) == (8 + 4, 12 + 12), "1e-48 is 0"
    assert model.training
    assert found
    assert not count_denormals(nn.ReLU(), torch.ones(2))
    assert "1 of 3 weights" in str(found)


def test_flushing_is_undone_on_exit():
    tiny = torch.full((8,), 1e-30)
    with flushed_denormals():
        assert not (tiny * 1e-9).view(torch.int32).any()
        with flushed_denormals():
            pass
        assert not (tiny * 1e-9).view(torch.int32).any(), "the inner context restores the outer one"
    assert denormals_in(tiny * 1e-9) == 8
    with flushed_denormals(False):
        assert denormals_in(tiny * 1e-9) == 8


def test_cpu_without_flushing_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "set_flush_denormal", lambda wanted: False)
    with pytest.raises(UsageError, match="cannot flush"), flushed_denormals():
        pass


def test_running_threads_are_refused():
    """Threads inherit the flag when they start: running ones keep denormals."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20) * 2.0
        with pytest.raises(UsageError, match="running already"), flushed_denormals():
            pass
    finally:
        torch.set_num_threads(threads)
    assert denormals_in(torch.full((8,), 1e-30) * 1e-9) == 8
