"""Plain kernels with scaled gradients follow the trajectory of branches with constant scales."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.blocks import BLOCKS, ConstantScaleSum, Geometry
from repvgg.errors import UsageError
from repvgg.training import RepOptimizer, merge_constant_scale_branches
from tests.bn_statistics import trained_like


def branched():
    """Return a model with two blocks of different scales, one of them with an identity, in training mode."""
    torch.manual_seed(0)
    scales = torch.rand(4, generator=torch.Generator().manual_seed(1)) + 0.5
    model = nn.Sequential(
        ConstantScaleSum(Geometry.square(3, 4, 2), dense=0.7, pointwise=scales),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        ConstantScaleSum(Geometry.square(4, 4, groups=2), dense=scales, pointwise=1.3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    return trained_like(model).double().train()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, **options)


def batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        yield torch.randn(5, 3, 9, 8, generator=generator, dtype=torch.float64), torch.arange(5) % 3


def backward(model, batch):
    images, labels = batch
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    return loss


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_plain_model_follows_the_branches(nesterov):
    model = branched()
    plain, multipliers = merge_constant_scale_branches(model)
    assert not any(isinstance(part, ConstantScaleSum) for part in plain.modules())
    slow, quick = sgd(model, nesterov=nesterov), RepOptimizer(sgd(plain, nesterov=nesterov), multipliers)
    for batch in batches():
        for network, optimizer in ((model, slow), (plain, quick)):
            optimizer.zero_grad()
            backward(network, batch)
            optimizer.step()
    for index in (0, 3):
        wanted = repvgg.equivalent_conv(model[index]).weight
        assert_close(plain[index].weight, wanted, rtol=1e-9, atol=1e-12)
    model, plain = model.eval(), plain.eval()
    images = next(batches())[0]
    assert_close(plain(images), model(images), rtol=1e-9, atol=1e-12)


def test_without_multipliers_it_deviates():
    model = branched()
    plain, _ = merge_constant_scale_branches(model)
    for network in (model, plain):
        optimizer = sgd(network)
        backward(network, next(batches()))
        optimizer.step()
    apart = (plain[3].weight - repvgg.equivalent_conv(model[3]).weight).abs().max()
    assert apart > 1e-4


def test_multipliers_of_a_worked_example():
    block = ConstantScaleSum(Geometry.square(2, 2), dense=2.0, pointwise=3.0)
    factor = block.multiplier()
    assert factor[0, 0].tolist() == [[4, 4, 4], [4, 4 + 9 + 1, 4], [4, 4, 4]]
    assert factor[0, 1].tolist() == [[4, 4, 4], [4, 4 + 9, 4], [4, 4, 4]]
    assert ConstantScaleSum(Geometry.square(2, 2, 2), 2.0, 3.0).multiplier()[0, 0, 1, 1] == 13


def test_closures_work_and_gradients_are_restored():
    """Lightning passes closures; a second step on the same gradients scales them once."""
    steps = []
    for with_closure in (False, True):
        plain, multipliers = merge_constant_scale_branches(branched())
        optimizer = RepOptimizer(sgd(plain), multipliers)
        batch = next(batches())
        if with_closure:
            assert optimizer.step(lambda plain=plain, batch=batch: backward(plain, batch)) > 0
        else:
            backward(plain, batch)
            optimizer.optimizer.step()
        gradient = plain[0].weight.grad.clone()
        optimizer.step()
        assert_close(plain[0].weight.grad, gradient, rtol=0, atol=0)
        steps.append(plain[0].weight.detach().clone())
    assert_close(*steps, rtol=1e-12, atol=1e-12)


def test_a_removed_hook_has_no_effect():
    plain, multipliers = merge_constant_scale_branches(branched())
    other, _ = merge_constant_scale_branches(branched())
    wrapped, bare = RepOptimizer(sgd(plain), multipliers), sgd(other)
    wrapped.remove()
    for network, optimizer in ((plain, wrapped), (other, bare)):
        backward(network, next(batches()))
        optimizer.step()
    assert_close(plain[0].weight, other[0].weight, rtol=0, atol=0)


def test_the_registered_block():
    model = nn.Sequential(BLOCKS["constant_scale"].make(Geometry.square(3, 3)), nn.ReLU()).double()
    plain, multipliers = merge_constant_scale_branches(model)
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    assert_close(plain.eval()(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    assert [tuple(p.shape) for p in multipliers] == [(3, 3, 3, 3)]


def test_invalid_multipliers_and_models_are_rejected():
    plain, multipliers = merge_constant_scale_branches(branched())
    with pytest.raises(UsageError, match="The model has no block of constant scales"):
        merge_constant_scale_branches(plain)
    with pytest.raises(UsageError, match="make the optimizer of the plain"):
        RepOptimizer(sgd(branched()), multipliers)
    with pytest.raises(UsageError, match="that shape"):
        RepOptimizer(sgd(plain), {plain[0].weight: torch.ones(1)})
    with pytest.raises(UsageError, match=r"A branch of 4 channels needs 1 or 4 scales, got 3"):
        ConstantScaleSum(Geometry.square(3, 4), dense=torch.ones(3))
