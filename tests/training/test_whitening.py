"""The whitened stem: decorrelated outputs, a frozen kernel that the plain form holds, and refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from repvgg import reparameterize
from repvgg.errors import UsageError
from repvgg.models import ModelSpec, Stage, create_model
from repvgg.training import build_initial_model, fit
from repvgg.training.whitening import principal_components, whiten_stem
from tests.training.helpers import CONFIG, opened

WIDE = ModelSpec("wide", Stage(1, 26, stride=1), (Stage(1, 8),))
WHITENED = replace(CONFIG, whiten_stem=True)


def correlated(n=64):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 1, 5, 5, generator=generator)
    return F.interpolate(coarse, (12, 12), mode="bilinear") + 0.3 * torch.randn(n, 3, 12, 12, generator=generator)


def test_components_decorrelate_patches():
    images = correlated()
    components = principal_components(images, 2)
    assert components.shape == (12, 3, 2, 2)
    assert_close(components.flatten(1) @ components.flatten(1).T, torch.eye(12), atol=1e-5, rtol=0)
    covariance = torch.cov(F.conv2d(images, components).transpose(0, 1).flatten(1))
    variances = covariance.diagonal()
    assert (variances.diff() <= 0).all()
    assert variances[0] > 10 * variances[-1]
    assert_close(covariance, torch.diag(variances), atol=1e-4 * float(variances[0]), rtol=0)
    assert (components.flatten(1).sum(1) > -1e-6).all()  # the sign is chosen, not the library's


def test_each_component_takes_two_channels():
    model = create_model(WIDE, 4, 3)
    dense, random = model.stem.conv["dense"], model.stem.conv["dense"].conv.weight.detach().clone()
    note = whiten_stem(model, opened())
    kernel = dense.conv.weight
    assert "12 principal components" in note
    assert not kernel.requires_grad
    assert_close(kernel[12:24], -kernel[:12])
    assert_close(kernel[24:], random[24:])  # 2 channels are left over
    assert (kernel[:24, :, 2] == 0).all()
    assert (kernel[:24, :, :, 2] == 0).all()
    assert (model.stem.conv["pointwise"].bn.weight == 0).all()


def test_training_keeps_the_kernel_and_collapses():
    data = opened(WHITENED)
    initial = build_initial_model(WHITENED, data)
    before = {name: value.clone() for name, value in initial.model.state_dict().items()}
    fit(initial.model, data, WHITENED, progress=False)
    after = initial.model.state_dict()
    assert_close(after["stem.conv.dense.conv.weight"], before["stem.conv.dense.conv.weight"], atol=0, rtol=0)
    for name in ("stem.conv.dense.bn.weight", "stem.conv.pointwise.bn.weight", "stem.conv.pointwise.conv.weight"):
        assert (after[name] != before[name]).any(), name
    images = torch.rand(2, *data.input_shape)
    plain, _ = reparameterize(initial.model.eval(), images)
    assert_close(plain(images), initial.model(images), atol=1e-4, rtol=1e-4)


def test_a_network_without_such_a_stem_is_refused():
    model = create_model(WIDE, 4, 3)
    plain, _ = reparameterize(model.eval(), torch.rand(1, 3, 8, 8))
    with pytest.raises(UsageError, match="without the branches of RepVGG"):
        whiten_stem(plain, opened())
