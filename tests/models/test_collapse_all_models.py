"""Every architecture, collapsed: exact in float64, rounded once to float32, and the modules of ``plain=True``."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg import create_model, is_plain, list_models, reparameterize
from repvgg.verify import border_inputs, verify
from tests.rounding import predicted_float32_error

FAST = ["repvgg_a0", "repvgg_t0", "repvgg_t1"]
MODELS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in list_models()]


def trained_like(name: str) -> nn.Module:
    """Return a model with batch norms as after training; its index is the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(list_models().index(name))
        model = create_model(name)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, 0, 0.2)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                nn.init.uniform_(part.weight, 0.3, 1.2)
                nn.init.normal_(part.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    train = trained_like(name)
    images = border_inputs((2, 3, 64, 64), batches=2)
    assert_float32_rounds_once(train, reparameterize(train)[0])
    train.double()
    plain, report = reparameterize(train)
    double = verify(train, plain, images).raise_if_failed()
    assert double.relative <= 1e-12, double
    assert is_plain(plain)
    assert not is_plain(train)
    assert not report.left
    assert len(report.folded) == sum(
        isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3) for part in plain.modules()
    )
    assert_skeleton(name, plain)
    with pytest.warns(UserWarning, match="Nothing was folded"):
        again, _ = reparameterize(plain)
    assert_close(again.state_dict(), plain.state_dict(), rtol=0, atol=0)


def assert_float32_rounds_once(train: nn.Module, plain: nn.Module) -> None:
    """In float32, each merged weight is rounded once, and the network errs no more than its additions explain.

    Root mean squares over all logits of 8 images: a largest error alone is an extreme of some thousand roundings, and
    for equally good forms differs by a third from image to image. See tests/rounding.py for the bound.
    """
    exact = copy.deepcopy(train).double()
    plain64, _ = reparameterize(exact)
    assert_close(plain.state_dict(), plain64.float().state_dict(), rtol=0, atol=0)
    (images,) = border_inputs((8, 3, 64, 64), batches=1, seed=1)
    with torch.inference_mode():
        logits = exact(images.double())
        for form in (plain, train):
            ours = form(images)
            assert_close(ours.argmax(1), logits.argmax(1), rtol=0, atol=0)
            error = float((ours - logits).square().mean().sqrt())
            assert error <= predicted_float32_error(form, images)


def assert_skeleton(name: str, plain: nn.Module) -> None:
    """Check that ``plain=True`` has the keys, shapes and geometry of the collapsed model."""
    with torch.device("meta"):
        skeleton = create_model(name, plain=True)
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert shapes == {key: value.shape for key, value in skeleton.state_dict().items()}
    for (path, ours), (wanted_path, wanted) in zip(plain.named_modules(), skeleton.named_modules(), strict=True):
        assert (path, type(ours)) == (wanted_path, type(wanted))
        if isinstance(ours, nn.Conv2d):
            assert repr(ours) == repr(wanted), path


def test_weights_outside_folded_regions_keep_their_bits():
    train = trained_like("repvgg_t0")
    before = copy.deepcopy(train.state_dict())
    plain, _ = reparameterize(train)
    assert_close(train.state_dict(), before, rtol=0, atol=0)
    for key in ("head.weight", "head.bias"):
        assert_close(plain.state_dict()[key], before[key], rtol=0, atol=0)
        assert plain.state_dict()[key].data_ptr() != train.state_dict()[key].data_ptr()


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_timm_models(name):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name).eval().double()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, 0, 0.1)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                nn.init.uniform_(part.weight, 0.5, 1.5)
    plain, report = reparameterize(model)
    evidence = verify(model, plain, border_inputs((1, 3, 65, 96), batches=1)).raise_if_failed()
    assert evidence.relative <= 1e-12
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    assert not report.left
    theirs = timm.utils.model.reparameterize_model(model)
    assert sum(p.numel() for p in plain.parameters()) <= sum(p.numel() for p in theirs.parameters())
