import pytest
import torch

from repvgg.blocks import BLOCKS, Geometry, create_block
from tests.blocks.helpers import images, randomize_norms, training_step


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_trains_under_autocast(name, layout):
    """On float32 inputs, like those of a first layer or after a float32 sum, results equal those of PyTorch."""
    torch.manual_seed(0)
    size = 9 if name in ("replk", "unireplk") else 3
    block = randomize_norms(create_block(name, Geometry.square(16, 16, kernel_size=size)))
    block = block.to(memory_format=layout)
    x = images(16, (12, 11), dtype=torch.float32, layout=layout)
    found, wanted = (training_step(block, x, kernels, amp=True) for kernels in ("auto", "eager"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is not None and value.is_floating_point():
            assert found[name].dtype == value.dtype, name
            error = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
            assert error < 0.05, (name, float(error))
