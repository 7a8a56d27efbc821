"""Blocks compared with timm's, which has its own implementation of each block and of its fold."""

import pytest
import torch
from timm.models.byobnet import MobileOneBlock
from timm.models.fastvit import RepMixer as TimmRepMixer
from torch.testing import assert_close

import repvgg
from repvgg.blocks import Geometry, RepMixer, create_block
from tests.blocks.published_formulas import randomized

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def images(channels):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 11, 14, generator=generator, dtype=torch.float64) + 1


def copy_tensors(ours, theirs):
    """Copy the tensors of a module; both have them in the same order under different names."""
    values = [value.clone() for value in theirs.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))


def copy_mobileone(peer, ours):
    """Copy the tensors of timm's branches into ours."""
    for copy, branch in enumerate(peer.conv_kxk):
        copy_tensors(ours[f"dense{copy or ''}"], branch)
    copy_tensors(ours["pointwise"], peer.conv_scale)
    if peer.identity is not None:
        copy_tensors(ours["identity"], peer.identity)


@pytest.mark.parametrize(("outputs", "stride", "group_size"), [(4, 1, None), (8, 1, None), (4, 2, None), (4, 1, 1)])
def test_mobileone(outputs, stride, group_size):
    peer = MobileOneBlock(4, outputs, 3, stride, group_size=group_size, num_conv_branches=4)
    randomized(peer.double())
    ours = create_block("mobileone", Geometry.square(4, outputs, stride, 4 if group_size else 1)).double().eval()
    copy_mobileone(peer, ours)
    x = images(4)
    expected = peer(x)
    assert_close(ours(x).relu(), expected, **EXACT)  # timm's block includes the ReLU
    peer.reparameterize()
    kernel, bias = repvgg.equivalent_conv(ours)
    assert_close(kernel, peer.reparam_conv.weight, **EXACT)
    assert_close(bias, peer.reparam_conv.bias, **EXACT)


def test_repmixer():
    peer = randomized(TimmRepMixer(4, layer_scale_init_value=0.5).double())
    ours = RepMixer(Geometry.square(4, 4, groups=4)).double().eval()
    mixer, norm = peer.mixer, peer.norm
    copy_tensors(ours.mixer["dense"], mixer.conv_kxk[0])
    copy_tensors(ours.mixer["pointwise"], mixer.conv_scale)
    copy_tensors(ours.mixer["identity"], mixer.identity)
    copy_tensors(ours.norm, norm.identity)
    with torch.no_grad():
        ours.scale.copy_(peer.layer_scale.gamma.view(-1, 1, 1))
    x = images(4)
    assert_close(ours(x), peer(x), **EXACT)
    peer.reparameterize()
    kernel, _ = repvgg.equivalent_conv(ours)
    assert_close(kernel, peer.reparam_conv.weight, **EXACT)
