"""Who takes part: the rows of the paper's tables, as networks with the same layers."""

import pytest
import torch

from repvgg import reparameterize
from repvgg.blocks import BLOCKS, Geometry, create_block
from repvgg.errors import UnknownModelError, UsageError
from repvgg.models import ModelSpec, RepVGG, Stage, create_model, form_of, spec_of
from repvgg.studies.contenders import BRANCHES, FULL, SMALL_B0, TWINS, VARIANTS, all_blocks, chosen, network_row
from repvgg.studies.paper import TABLE_6, TABLE_7
from tests.bn_statistics import trained_like

SPEC = ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(2, 8), Stage(3, 8)))
ALL = {row.name: row for row in (*BRANCHES, *VARIANTS)}


def test_rows_stand_in_the_papers_order_with_its_numbers():
    assert [(row.identity, row.pointwise, row.top1_percent) for row in BRANCHES] == [
        (row.identity, row.pointwise, row.top1_percent) for row in TABLE_6
    ]
    assert [(row.title, row.top1_percent) for row in VARIANTS] == [(row.title, row.top1_percent) for row in TABLE_7]
    assert len(ALL) == 11, "the full block is in both"
    assert FULL in ALL


@pytest.mark.parametrize("name", ALL)
def test_all_but_two_become_the_same_plain_network(name):
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


def test_every_block_that_has_a_form_takes_part():
    names = [row.name for row in all_blocks()]
    assert {"conv_bn", FULL, "dbb", "orepa", "repmixer", "mobileone"} <= set(names)
    assert "unireplk" not in names, "its kernels are 5x5 and larger"
    assert len(names) == len(BLOCKS) - 1 - len(TWINS)
    assert {row.name: row.top1_percent for row in all_blocks()}["acb"] == 73.58


def test_rows_of_models_and_rows_of_studies():
    assert network_row("b0-small") is SMALL_B0
    b0 = spec_of("repvgg_b0")
    assert [(s.depth, 4 * s.channels) for s in SMALL_B0.stages] == [(s.depth, s.channels) for s in b0.stages]
    assert network_row("repvgg_b0").name == "repvgg_b0"
    with pytest.raises(UnknownModelError):
        network_row("b0-smal")
    assert [row.name for row in chosen(BRANCHES, ["repvgg", "conv_bn"])] == ["conv_bn", "repvgg"]
    assert chosen(BRANCHES, []) == BRANCHES
    with pytest.raises(UsageError, match="did you mean conv_bn"):
        chosen(BRANCHES, ["conv_b"])
    with pytest.raises(UsageError, match="there are conv_bn"):
        chosen(BRANCHES, ["xyzzy"])


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_twins_are_the_same_with_3x3_kernels(name, twin):
    block, other = (create_block(one, Geometry.square(4, 4)) for one in (name, twin))
    assert [value.shape for value in block.state_dict().values()] == [v.shape for v in other.state_dict().values()]
    with torch.no_grad():
        for mine, theirs in zip(block.state_dict().values(), other.state_dict().values(), strict=True):
            theirs.copy_(mine)
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(block(x), other(x))
