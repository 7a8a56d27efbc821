"""``create_model(name, plain=True)`` has the keys, shapes and geometry that collapsing the train form gives."""

import pytest
import torch
from torch.testing import assert_close

from repvgg import create_model, is_plain, list_models, reparameterize
from tests.bn_statistics import trained_like
from tests.models.helpers import TINY, TINY_PLUS, convolutions


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", list_models())
def test_every_model(name):
    """On the meta device: nothing is computed, and no memory is needed."""
    with torch.device("meta"):
        train, skeleton = create_model(name).eval(), create_model(name, plain=True).eval()
    collapsed, report = reparameterize(train)
    assert list(shapes(collapsed).items()) == list(shapes(skeleton).items())
    assert convolutions(collapsed) == convolutions(skeleton)
    assert [type(m) for m in collapsed.modules()] == [type(m) for m in skeleton.modules()]
    assert len(report.folded) == 1 + sum(stage.depth for stage in train.spec.stages)
    assert report.left == ()
    assert [entry.name for entry in report.dropped] == [f"auxiliary.stage{index}" for index in train.spec.auxiliary]


@pytest.mark.parametrize("spec", [TINY, TINY_PLUS, "repvgg_t0"])
@pytest.mark.parametrize("channels", [1, 3])
def test_loads_the_weights_of_the_collapsed_model(spec, channels):
    torch.manual_seed(0)
    train = trained_like(create_model(spec, 5, channels)).double()
    collapsed, _ = reparameterize(train)
    skeleton = create_model(spec, 5, channels, plain=True).double().eval()
    skeleton.load_state_dict(collapsed.state_dict())
    assert is_plain(skeleton)
    images = torch.randn(2, channels, 37, 29, dtype=torch.float64)
    with torch.no_grad():
        assert_close(skeleton(images), train(images), rtol=1e-11, atol=1e-11)


def test_is_plain():
    for name in ("repvgg_t0", "repvgg_a0"):
        with torch.device("meta"):
            assert is_plain(create_model(name, plain=True))
            assert not is_plain(create_model(name))
