"""The variants of the ablations: rows of the paper's tables as networks with the same layers."""

import pytest
import torch

from repvgg import reparameterize
from repvgg.blocks import BLOCKS, Geometry, create_block
from repvgg.errors import UnknownModelError, UsageError
from repvgg.models import ModelSpec, RepVGG, Stage, create_model, form_of, spec_of
from repvgg.studies.paper import TABLE_6, TABLE_7
from repvgg.studies.variants import (
    EQUAL_AT_3X3,
    FULL,
    SMALL_B0,
    TABLE_6_VARIANTS,
    TABLE_7_VARIANTS,
    base_architecture,
    block_variants,
    select_variants,
)
from tests.bn_statistics import trained_like

SPEC = ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(2, 8), Stage(3, 8)))
ALL = {row.name: row for row in (*TABLE_6_VARIANTS, *TABLE_7_VARIANTS)}


def test_variants_have_the_order_and_numbers_of_the_paper():
    assert [(row.identity, row.pointwise, row.top1_percent) for row in TABLE_6_VARIANTS] == [
        (row.identity, row.pointwise, row.top1_percent) for row in TABLE_6
    ]
    assert [(row.title, row.top1_percent) for row in TABLE_7_VARIANTS] == [
        (row.title, row.top1_percent) for row in TABLE_7
    ]
    assert len(ALL) == 11, "the full block is in both"
    assert FULL in ALL


@pytest.mark.parametrize("name", ALL)
def test_all_variants_but_two_collapse_to_the_same_architecture(name):
    model = trained_like(ALL[name].make(SPEC, 5, 3))
    images = torch.randn(2, 3, 16, 16)
    plain, _ = reparameterize(model, images)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)
    if name in ("repvgg_relu", "residual_reorg"):
        assert not (isinstance(plain, RepVGG) and form_of(plain) == "plain")
        return
    wanted = create_model(SPEC, 5, plain=True).state_dict()
    assert {key: value.shape for key, value in plain.state_dict().items()} == {
        key: value.shape for key, value in wanted.items()
    }


def test_every_block_with_3x3_kernels_is_a_variant():
    names = [row.name for row in block_variants()]
    assert {"conv_bn", FULL, "dbb", "orepa", "repmixer", "mobileone"} <= set(names)
    assert "unireplk" not in names, "its kernels are 5x5 and larger"
    assert len(names) == len(BLOCKS) - 1 - len(EQUAL_AT_3X3)
    assert {row.name: row.top1_percent for row in block_variants()}["acb"] == 73.58


def test_architectures_and_variants_by_name():
    assert base_architecture("b0-small") is SMALL_B0
    b0 = spec_of("repvgg_b0")
    assert [(s.depth, 4 * s.channels) for s in SMALL_B0.stages] == [(s.depth, s.channels) for s in b0.stages]
    assert base_architecture("repvgg_b0").name == "repvgg_b0"
    with pytest.raises(UnknownModelError):
        base_architecture("b0-smal")
    assert [row.name for row in select_variants(TABLE_6_VARIANTS, ["repvgg", "conv_bn"])] == ["conv_bn", "repvgg"]
    assert select_variants(TABLE_6_VARIANTS, []) == TABLE_6_VARIANTS
    with pytest.raises(UsageError, match="did you mean conv_bn"):
        select_variants(TABLE_6_VARIANTS, ["conv_b"])
    with pytest.raises(UsageError, match="choose one of conv_bn"):
        select_variants(TABLE_6_VARIANTS, ["xyzzy"])


@pytest.mark.parametrize(("name", "equal"), EQUAL_AT_3X3.items())
def test_equal_blocks_are_the_same_function_with_3x3_kernels(name, equal):
    block, other = (create_block(one, Geometry.square(4, 4)) for one in (name, equal))
    assert [value.shape for value in block.state_dict().values()] == [v.shape for v in other.state_dict().values()]
    with torch.no_grad():
        for mine, theirs in zip(block.state_dict().values(), other.state_dict().values(), strict=True):
            theirs.copy_(mine)
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(block(x), other(x))
