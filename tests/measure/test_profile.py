"""Profile tables: every op and parameter is in exactly one row, and the rows sum up to the total."""

from collections import namedtuple

import pytest
import torch
from torch import nn

from repvgg.errors import UsageError
from repvgg.measure import Profile, Row, profile, walk
from repvgg.models import create_baseline, create_model
from tests.measure.networks import Call

Named = namedtuple("Named", ["scores", "boxes"])
SUMS = ("params", "ops", "macs", "winograd_muls", "bytes_read", "bytes_written")


def on_meta(name: str, plain: bool) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        return create_model(name, plain=plain), torch.empty(1, 3, 64, 64)


def assert_sums(done: Profile) -> None:
    for rows in (done.layers, done.stages):
        assert len({row.name for row in rows}) == len(rows)
        for name in SUMS:
            assert sum(getattr(row, name) for row in rows) == getattr(done.total, name), name
        assert max(row.peak_bytes for row in rows) == done.total.peak_bytes


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_d2se", "repvggplus_l2pse"])
def test_rows_of_architectures_sum_up(name, plain):
    model, x = on_meta(name, plain)
    done = profile(model, x)
    assert_sums(done)
    stages = 6 if name == "repvggplus_l2pse" else 5
    names = [row.name for row in done.stages]
    assert names[:stages] == ["stem", *(f"stages.{index}" for index in range(stages - 1))]
    assert done.total.params == sum(p.numel() for p in model.parameters())
    assert done.total.macs == walk(model, x).macs
    assert done.weight_bytes == 4 * done.total.params + sum(b.numel() * b.element_size() for b in model.buffers())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "regnetx_3_2gf", "mobileone_s1"])
def test_rows_of_baselines_sum_up(name):
    done = profile(create_baseline(name, values=False), torch.empty(1, 3, 64, 64, device="meta"))
    assert_sums(done)
    assert all(row.ops for row in done.stages)


STAGES = {
    "resnet18": ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "", "fc"],
    "vgg16": ["features", "avgpool", "", "classifier"],
    "mobileone_s0": ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"],
    "efficientnet_b0": [*(f"features.{index}" for index in range(9)), "avgpool", "", "classifier"],
}


@pytest.mark.parametrize("name", STAGES)
def test_stage_paths(name):
    model = create_baseline(name, values=False)
    assert [row.name for row in profile(model, torch.empty(1, 3, 64, 64, device="meta")).stages] == STAGES[name]


class Odd(nn.Module):
    """A module called twice, one never called, a parameter at the root, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.twice.weight
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.tied(self.twice(self.twice(x))) * self.scale


def test_shared_repeated_and_unreached_modules():
    done = profile(Odd(), torch.ones(2, 4))
    rows = {row.name: row for row in done.layers}
    assert list(rows) == ["twice", "tied", "", "never"]  # order of execution; unreached modules come last
    assert (rows["twice"].params, rows["twice"].macs) == (20, 2 * 2 * 16)
    assert (rows["tied"].params, rows["tied"].macs) == (0, 2 * 16)
    assert (rows["never"].params, rows["never"].ops, rows["never"].macs) == (20, 0, 0)
    assert (rows[""].params, rows[""].kind, rows[""].ops) == (4, "Odd", 1)
    assert_sums(done)
    assert done.weight_bytes == 4 * (20 + 20 + 4)


def test_intensity_is_multiply_adds_per_byte():
    total = profile(nn.Linear(8, 8, bias=False), torch.ones(2, 8)).total
    assert total.intensity == pytest.approx(2 * 64 / (4 * (16 + 64 + 16)))
    assert profile(nn.Flatten(), torch.ones(2, 2, 2)).total.intensity is None, "a view moves nothing"
    assert profile(Call(lambda x: torch.cdist(x, x) @ x), torch.ones(3, 3)).total.intensity is None


def test_unknown_ops_are_named_in_their_row():
    model = nn.Sequential(nn.Linear(3, 3), Call(lambda x: torch.cdist(x, x)))
    done = profile(model, torch.ones(3, 3))
    assert [(row.name, row.unknown, row.unknown_traffic) for row in done.layers] == [
        ("0", (), ()),
        ("1", ("aten._cdist_forward",), ("aten._cdist_forward",)),
    ]
    assert done.total.unknown == ("aten._cdist_forward",)
    assert done.total.to_dict()["macs_per_byte"] is None


def test_row_as_json():
    row = Row("a", "Linear", 1, 2, 30, 40, 5, 1, 6, ("aten.x",))
    assert row.to_dict() == {
        "name": "a",
        "kind": "Linear",
        "params": 1,
        "ops": 2,
        "macs": 30,
        "winograd_muls": 40,
        "bytes_read": 5,
        "bytes_written": 1,
        "bytes_moved": 6,
        "macs_per_byte": None,
        "peak_bytes": 6,
        "unknown": ["aten.x"],
        "unknown_traffic": [],
    }


def test_model_without_ops_and_parameters():
    done = profile(nn.Identity(), torch.ones(3))
    assert (done.total.ops, done.total.params, done.layers, done.stages) == (0, 0, (), ())


def test_hooks_are_removed_after_an_error():
    hooks = torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks
    before = [len(group) for group in hooks]

    def failing(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profile(nn.Sequential(Call(failing)), torch.ones(3))
    assert [len(group) for group in hooks] == before


def test_path_is_right_after_an_error_that_the_model_catches():
    class Trying(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.works = nn.Linear(5, 5), nn.Linear(3, 3)

        def forward(self, x):
            try:
                return self.fails(x)
            except RuntimeError:
                return self.works(x).relu()

    assert [op.path for op in walk(Trying(), torch.ones(2, 3)).ops if op.name != "aten.t"] == ["works", ""]


def test_unsupported_tile():
    with pytest.raises(UsageError, match="tiles of 2 or 4 outputs, not 3"):
        profile(nn.ReLU(), torch.ones(1), tile=3)


@pytest.mark.parametrize("pack", [lambda y: {"a": y, "b": [2 * y]}, lambda y: (y, (2 * y,)), lambda y: Named(y, 2 * y)])
def test_outputs_of_any_structure(pack):
    conv = nn.Conv2d(3, 4, 3)
    done = profile(Call(lambda x: pack(conv(x))), torch.empty(2, 3, 8, 9))
    assert done.total.macs == 2 * 4 * 27 * 6 * 7
    assert done.total.ops == 2
