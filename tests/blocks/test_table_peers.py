"""Blocks of the table against the same blocks in timm, which has its own code for each and its own way to fold them."""

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


def take_on(ours, theirs):
    """The tensors of a module; both have them in the same order, whatever they are called."""
    values = [value.clone() for value in theirs.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))


def mobileone_of(peer, ours):
    """Our branches with the tensors of timm's."""
    for copy, branch in enumerate(peer.conv_kxk):
        take_on(ours[f"dense{copy or ''}"], branch)
    take_on(ours["pointwise"], peer.conv_scale)
    if peer.identity is not None:
        take_on(ours["identity"], peer.identity)


@pytest.mark.parametrize(("outputs", "stride", "group_size"), [(4, 1, None), (8, 1, None), (4, 2, None), (4, 1, 1)])
def test_mobileone(outputs, stride, group_size):
    peer = MobileOneBlock(4, outputs, 3, stride, group_size=group_size, num_conv_branches=4)
    randomized(peer.double())
    ours = create_block("mobileone", Geometry.square(4, outputs, stride, 4 if group_size else 1)).double().eval()
    mobileone_of(peer, ours)
    x = images(4)
    expected = peer(x)
    assert_close(ours(x).relu(), expected, **EXACT)  # the peer's ends with it
    peer.reparameterize()
    kernel, bias = repvgg.equivalent_conv(ours)
    assert_close(kernel, peer.reparam_conv.weight, **EXACT)
    assert_close(bias, peer.reparam_conv.bias, **EXACT)


def test_repmixer():
    peer = randomized(TimmRepMixer(4, layer_scale_init_value=0.5).double())
    ours = RepMixer(Geometry.square(4, 4, groups=4)).double().eval()
    mixer, norm = peer.mixer, peer.norm
    take_on(ours.mixer["dense"], mixer.conv_kxk[0])
    take_on(ours.mixer["pointwise"], mixer.conv_scale)
    take_on(ours.mixer["identity"], mixer.identity)
    take_on(ours.norm, norm.identity)
    with torch.no_grad():
        ours.scale.copy_(peer.layer_scale.gamma.view(-1, 1, 1))
    x = images(4)
    assert_close(ours(x), peer(x), **EXACT)
    peer.reparameterize()
    kernel, _ = repvgg.equivalent_conv(ours)
    assert_close(kernel, peer.reparam_conv.weight, **EXACT)
