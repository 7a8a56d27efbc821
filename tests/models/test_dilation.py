"""Dilated backbones: which layers are dilated, and what equals the strided network."""

import pytest
import torch
from torch import nn

from repvgg.errors import UsageError
from repvgg.models import RepVGGBackbone, Stage, build_pspnet, create_model, dilate_, spec_of
from repvgg.models.backbones import ResNetBackbone
from repvgg.models.spec import ModelSpec, PSPNetSpec
from tests.bn_statistics import trained_like

SMALL = ModelSpec("small", Stage(1, 8), (Stage(2, 8), Stage(2, 12), Stage(6, 16), Stage(1, 20)))


def dilations(module):
    """Of the k x k convolutions, in order."""
    return [conv.dilation[0] for conv in module.modules() if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1)]


def backbone(rule=None, output_stride=8):
    torch.manual_seed(0)
    made = RepVGGBackbone(SMALL, 3, plain=False)
    if rule:
        dilate_(list(made.stages), SMALL.stem.stride, output_stride, rule)
    return trained_like(made).double()


@pytest.mark.parametrize(
    ("rule", "stage4", "stage5"), [("paper", [2] * 6, 4), ("exact", [1] + [2] * 5, 2), ("fast", [1, 1, 2, 2, 2, 2], 4)]
)
def test_which_layers_are_dilated(rule, stage4, stage5):
    made = backbone(rule)
    assert dilations(made.stages[2]) == stage4
    assert dilations(made.stages[3]) == [stage5]
    assert set(dilations(made.stages[:2])) == {1}
    assert [x.shape[-1] for x in made.features(torch.rand(1, 3, 65, 65, dtype=torch.float64))] == [33, 17, 9, 9, 9]


def test_output_stride_16_dilates_the_last_stage_only():
    assert dilations(backbone("paper", 16)) == [1] * 11 + [2]


def test_names_and_shapes_are_those_of_the_classifier():
    strided = backbone().state_dict()
    dilated = backbone("paper").state_dict()
    assert {name: x.shape for name, x in strided.items()} == {name: x.shape for name, x in dilated.items()}


# Odd and even sizes: the last pixel of the coarse grid is then on the border, or not.
@pytest.mark.parametrize("size", [(65, 97), (64, 80), (71, 70)])
@pytest.mark.parametrize("kind", ["repvgg", "resnet18", "resnet50"])
def test_exact_rule_equals_the_strided_network_on_its_grid(kind, size):
    def make(dilated):
        torch.manual_seed(1)
        made = RepVGGBackbone(SMALL, 3, plain=False) if kind == "repvgg" else ResNetBackbone(kind)
        if dilated and kind == "repvgg":
            dilate_(list(made.stages), 2, 8, "exact")
        elif dilated:
            dilate_([made.get_submodule(f"layer{n}") for n in (1, 2, 3, 4)], 4, 8, "exact")
        return trained_like(made).double()

    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        coarse, fine = make(False).features(x)[-1], make(True).features(x)[-1][:, :, ::4, ::4]
    torch.testing.assert_close(fine, coarse, rtol=1e-11, atol=1e-11 * coarse.abs().max().item())


def test_the_rule_of_the_paper_differs_from_the_strided_network():
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        coarse, fine = backbone().features(x)[-1], backbone("paper").features(x)[-1][:, :, ::4, ::4]
    assert (fine - coarse).norm() > 0.05 * coarse.norm()


def test_every_fast_model_has_five_dilated_layers_and_all_others_two_stages():
    for size in ("a0", "b1g2"):
        depths = [stage.depth for stage in spec_of(f"repvgg_{size}").stages]
        with torch.device("meta"):
            fast, normal = (create_model(f"pspnet_repvgg_{size}{end}", 19) for end in ("_fast", ""))
        assert sum(d > 1 for d in dilations(fast.backbone)) == 5
        assert sum(d > 1 for d in dilations(normal.backbone)) == depths[2] + depths[3]


def test_a_network_whose_strides_end_too_early_is_refused():
    made = RepVGGBackbone(SMALL, 3, plain=False)
    with pytest.raises(UsageError, match="reach 4, not the output stride of 8"):
        dilate_(list(made.stages[:1]), 2, 8)
    with pytest.raises(UsageError, match="only convolutions can be dilated"):
        dilate_([nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.MaxPool2d(2))], 8, 8)
    with pytest.raises(UsageError, match="padding"):
        dilate_([nn.Conv2d(3, 4, 3, 2, 0)], 8, 8)
    with pytest.raises(UsageError, match="no backbone 'vgg'"):
        build_pspnet(PSPNetSpec("mine", "vgg"), 3)
