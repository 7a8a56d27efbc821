"""The comparison networks of §4.2: layers, counts and collapse."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.blocks import BLOCKS, BranchSum, DiracConv2d
from repvgg.errors import NotLinearError, OtherBlockWarning, UnknownModelError, UsageError
from repvgg.models import (
    COMPARISONS,
    ModelSpec,
    Stage,
    create_comparison,
    create_variant,
    delta_orthogonal_,
    max_norm_,
    plain_net,
    residual_reorg,
    resolve,
    spec_of,
)
from repvgg.models.variants import ResidualBlock
from tests.bn_statistics import trained_like

SMALL = ModelSpec("small", Stage(1, 4, stride=1), (Stage(2, 6), Stage(3, 8), Stage(1, 8)), input_size=32)


def image(size=(21, 18), count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *size, generator=generator, dtype=torch.float64)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore::repvgg.errors.OtherBlockWarning")
@pytest.mark.parametrize("block", [name for name, entry in BLOCKS.items() if entry.is_linear and name != "unireplk"])
def test_variants_collapse_to_the_plain_form_of_their_model(block):
    torch.manual_seed(0)
    model = trained_like(create_variant(SMALL, block, num_classes=5).double())
    plain, _ = repvgg.reparameterize(model)
    wanted = repvgg.create_model(SMALL, num_classes=5, plain=True)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in wanted.state_dict().items()}
    with torch.no_grad():
        out, expected = plain(image()), model(image())
    assert_close(out, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_relu_in_branches_prevents_collapse():
    model = create_variant(SMALL, "repvgg_relu", num_classes=5).eval()
    with pytest.raises(NotLinearError, match="relu"):
        repvgg.trace(model.stem.conv)
    plain, _ = repvgg.reparameterize(model)
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == 14


def test_unsupported_variants():
    with pytest.raises(UsageError, match="No layer of small"):
        create_variant(SMALL, "unireplk")
    with pytest.raises(UsageError, match="did you mean dbb"):
        create_variant(SMALL, "dbbb")
    with pytest.raises(UsageError, match="at least one class"):
        create_variant(SMALL, "acb", 0)


def test_fallback_block_is_reported():
    """RepMixer supports layers that keep their shape: three of the seven here."""
    with pytest.warns(OtherBlockWarning, match="4 of 7 layers are 'conv_bn' in place of 'repmixer': "):
        model = create_variant(SMALL, "repmixer")
    kinds = [type(part).__name__ for part in model.modules()]
    assert kinds.count("RepMixer") == 3


def test_residual_reorg_of_b0_has_the_published_blocks():
    with torch.device("meta"):
        model = create_comparison("residual_reorg_b0")
    blocks = [sum(isinstance(part, ResidualBlock) for part in stage) for stage in model.stages]
    assert blocks == [2, 3, 8, 0]
    kernels = [part for part in model.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)]
    with torch.device("meta"):
        plain = repvgg.create_model("repvgg_b0", plain=True)
    wanted = [part.weight.shape for part in plain.modules() if isinstance(part, nn.Conv2d)]
    assert [part.weight.shape for part in kernels] == wanted


def test_residual_blocks_stay_residual():
    torch.manual_seed(0)
    model = trained_like(residual_reorg(SMALL, 5).double())
    plain, report = repvgg.reparameterize(model)
    assert report.left == ()
    assert_close(plain(image()), model(image()), rtol=1e-10, atol=1e-10)
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == 7 + 1  # layers, and a shortcut
    with pytest.raises(UsageError, match="groups or gates"):
        residual_reorg(spec_of("repvgg_b1g2"))
    with pytest.raises(UsageError, match="groups or gates"):
        plain_net(spec_of("repvgg_d2se"), nn.Tanh, delta_orthogonal_)


@pytest.mark.parametrize(("name", "depths"), [("diracnet18", (2, 2, 2, 2)), ("diracnet34", (3, 4, 6, 3))])
def test_dirac_nets_are_resnets_without_shortcuts(name, depths):
    with torch.device("meta"):
        model = create_comparison(name)
    layers = [part for part in model.modules() if isinstance(part, DiracConv2d)]
    assert len(layers) == 2 * sum(depths)
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        resnet = torchvision.models.get_model(f"resnet{name[-2:]}")
    shortcuts = sum(parameters(part) for n, part in resnet.named_modules() if n.endswith("downsample"))
    scales = sum(2 * part.out_channels for part in layers)
    assert parameters(model) == parameters(resnet) - shortcuts + scales
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize(("name", "published"), [("diracnet18", 11_511_784), ("diracnet34", 21_616_232)])
def test_dirac_nets_collapse_to_the_size_of_the_published_weights(name, published):
    """The authors publish folded weights; a model zoo (imgclsmob) counts their parameters."""
    plain, _ = repvgg.reparameterize(create_comparison(name).eval(), torch.zeros(1, 3, 64, 64), prove=False)
    assert parameters(plain) == published


def test_delta_orthogonal_scales_norms_by_gain():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).double()
    delta_orthogonal_(conv.weight, gain=2.0)
    x = image()[:, :1].expand(-1, 4, -1, -1) * torch.arange(1, 5).view(-1, 1, 1)
    assert_close(conv(x).norm(), 2 * x.norm(), rtol=1e-12, atol=0)
    off_centre = conv.weight.clone()
    off_centre[:, :, 1, 1] = 0
    assert not off_centre.any()


def test_delta_orthogonal_plain_net_preserves_signals():
    torch.manual_seed(0)
    deep = ModelSpec("deep", Stage(1, 8, stride=1), (Stage(60, 8, stride=1),))
    x = image() * 1e-3  # where tanh is the identity
    for start, passes in ((delta_orthogonal_, True), (lambda w: nn.init.normal_(w, 0, 0.05), False)):
        model = plain_net(deep, nn.Tanh, start, 5).double()
        y = model.stages[0](model.stem(x))
        assert bool(y.norm() > 0.9 * x.norm()) is passes


def test_max_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model[0].weight.data[0] *= 1e-3
    model[0].weight.data[1] = 0
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    optimizer.register_step_post_hook(lambda *_: max_norm_(model, 0.5))
    max_norm_(model, 0.5)
    lengths = model[0].weight.flatten(1).norm(dim=1)
    assert_close(model[0].weight[:2], before[:2], rtol=0, atol=0)
    assert_close(lengths[2:], torch.full((2,), 0.5))
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert max(part.weight.flatten(1).norm(dim=1).max() for part in (model[0], model[2])) <= 0.5 + 1e-6


def test_resnet50_of_repvgg_blocks():
    torch.manual_seed(0)
    model = create_comparison("resnet50_repvgg", 7)
    blocks = [part for part in model.modules() if isinstance(part, BranchSum)]
    assert len(blocks) == 16
    assert all("identity" in part for part in blocks), "the first 1x1 has the stride, as in the baseline"
    model = trained_like(model)
    plain, report = repvgg.reparameterize(model, prove=False)
    assert report.left == ()
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        resnet = torchvision.models.resnet50(num_classes=7)
    biases = sum(part.num_features for part in resnet.modules() if isinstance(part, nn.BatchNorm2d))
    assert parameters(plain) == parameters(resnet) - biases  # one bias replaces γ and β
    with torch.no_grad():
        x = image((64, 57)).float()
        assert_close(plain(x), model(x), rtol=0, atol=1e-4 * float(model(x).abs().max()))


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "resnet50_repvgg"])
def test_every_comparison_builds_and_runs(name):
    with torch.device("meta"):
        model = create_comparison(name, 7)
    entry = COMPARISONS[name]
    assert model.training
    assert entry.origin
    assert model(torch.empty(2, 3, entry.input_size, entry.input_size, device="meta")).shape == (2, 7)


def test_source_strings():
    sourced = resolve("repvgg:diracnet18", num_classes=7, values=False)
    assert sourced.input_shape == (3, 224, 224)
    assert sourced.model.head.out_features == 7
    gray = resolve("repvgg:residual_reorg_b0", in_channels=1, values=False)
    assert gray.model.stem[0].conv.in_channels == gray.input_shape[0] == 1
    with pytest.raises(UsageError, match="3 channels, not 1"):
        resolve("repvgg:resnet50_repvgg", in_channels=1)


def test_unknown_names():
    with pytest.raises(UnknownModelError, match="did you mean diracnet"):
        create_comparison("diracnet")
    with pytest.raises(UsageError, match="at least one class"):
        create_comparison("diracnet18", 0)
