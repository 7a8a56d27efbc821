"""Convolutions that are not replaced, and the reason in the report."""

import re
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import repvgg
from repvgg.errors import NothingExpandedWarning, ReparamError
from repvgg.expansion.sites import find_sites
from tests.expansion.models import assert_same_outputs, image, module, trained, untouched, vgg


def conv(*args, **kwargs):
    return nn.Conv2d(*(args or (4, 4, 3)), **{"padding": 1, **kwargs})


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def hooked():
    out = conv()
    out.register_forward_hook(lambda *_: None)
    return out


def patched():
    out = conv()
    out.forward = lambda x: x
    return out


def tied():
    a, b = conv(), conv()
    b.weight = a.weight
    return module(lambda self, x: self.b(self.a(x)), a=a, b=b)


def listed():
    out = module(lambda self, x: self.parts[0](x), a=conv())
    out.parts = [out.a]
    return out


def method():
    out = module(lambda self, x: self.call(x), a=conv())
    out.call = out.a.forward
    return out


def read():
    return module(lambda self, x: F.conv2d(x, self.a.weight * 2, padding=1) + self.a(x), a=conv())


def read_by_another():
    inner = module(lambda self, x: self.a(x), a=conv())
    return module(lambda self, x: self.inner(x) + self.inner.a.weight.mean(), inner=inner)


LEFT = {
    "parametrized": (lambda: parametrizations.weight_norm(conv()), "parametrization"),
    "own forward": (lambda: Standardized(4, 4, 3), "Standardized overrides forward"),
    "hooks": (hooked, "it has hooks"),
    "replaced forward": (patched, "replaced on the instance"),
    "lazy": (lambda: nn.LazyConv2d(4, 3), "run the model once"),
    "tied": (tied, "shares a parameter"),
    "in a list": (listed, "held in an attribute"),
    "a method of it": (method, "held in an attribute"),
    "its kernel is read": (read, "read from outside"),
    "its kernel is read from afar": (read_by_another, "read from outside"),
    "complex": (lambda: conv(dtype=torch.complex64), "no real numbers"),
    "meta": (lambda: conv(device="meta"), "no real numbers"),
    "1x1": (lambda: conv(4, 4, 1, padding=0), "1x1: select it with where="),
    "even": (lambda: conv(4, 4, 2), "2x2 kernel has no centre"),
    "no padding": (lambda: conv(padding=0), r"padding is \(0, 0\), but .* only at padding \(1, 1\)"),
    "valid padding": (lambda: conv(padding="valid"), r"padding is \(0, 0\)"),
    "too much padding": (lambda: conv(padding=2), r"padding is \(2, 2\)"),
    "all zero": (lambda: zeroed(conv()), "differs from the convolution by inf"),
}


def zeroed(part):
    for parameter in part.parameters():
        nn.init.zeros_(parameter)
    return part


@pytest.mark.parametrize("name", LEFT)
def test_skipped_with_a_reason(name):
    make, reason = LEFT[name]
    model = nn.Sequential(make(), trained(nn.Sequential(conv(dtype=torch.float32)), torch.float32)).eval()
    expanded, report = repvgg.expand(model)
    assert [entry.name for entry in report.expanded] == ["1.0"]
    assert len(report.left) >= 1
    for entry in report.left:
        assert re.search(reason, entry.reason), entry.reason
        assert type(expanded.get_submodule(entry.name)) is type(model.get_submodule(entry.name))


def test_nothing_is_patched_while_a_forward_is_examined():
    """Other threads run their models meanwhile."""
    before, seen = (nn.Module.__call__, nn.Module.__getattr__), []

    def forward(self, x):
        seen.append((nn.Module.__call__, nn.Module.__getattr__))
        height, width = x.shape[2:]
        return self.a(x).reshape(1, -1, height, width) + self.b.weight.sum()

    model = module(forward, a=conv(), b=conv())
    assert [site.refusal for site in find_sites(model)] == [None, "its parameters are read from outside of it"]
    assert set(seen) == {before}


def test_convolutions_with_other_paddings_still_run():
    model = trained(nn.Sequential(conv(padding=0), nn.ReLU(), conv(padding=2), conv(), nn.ReLU()))
    expanded, report = untouched(repvgg.expand, model)
    assert [entry.name for entry in report.left] == ["0", "2"]
    assert_same_outputs(model, expanded, image(4))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), conv(4, 4, 1, padding=0), conv(padding=0)])
def test_nothing_to_expand_warns(model):
    with pytest.warns(NothingExpandedWarning, match="No convolution was expanded"):
        out, report = repvgg.expand(model.eval())
    assert report.expanded == ()
    assert out is not model


def test_where_gets_names_and_convolutions_of_the_input():
    model = trained(nn.Sequential(*vgg()[:3], nn.Conv2d(8, 8, 1)))
    seen = {}
    expanded, report = untouched(
        repvgg.expand, model, where=lambda name, part: seen.setdefault(name, part) and name in "23"
    )
    assert seen == {"0": model[0], "2": model[2], "3": model[3]}
    assert [entry.name for entry in report.expanded] == ["2", "3"]  # also a 1x1 convolution, if it is selected
    assert [(entry.name, entry.reason) for entry in report.left] == [("0", "where= leaves it out")]
    assert_same_outputs(model, expanded, image())


def test_uncopyable_model_raises():
    model = vgg()
    model.lock = threading.Lock()
    with pytest.raises(ReparamError, match="cannot be copied"):
        repvgg.expand(model)


def test_module_that_returns_itself_as_a_copy_raises():
    kind = type("Own", (nn.Sequential,), {"__deepcopy__": lambda self, memo: self})
    with pytest.raises(ReparamError, match="'1' returns itself as its copy"):
        repvgg.expand(nn.Sequential(conv(), kind(conv())))


def test_report_is_data_and_text():
    model = trained(nn.Sequential(conv(), conv(4, 4, 1, padding=0)))
    _, report = repvgg.expand(model)
    assert report.to_dict()["left"] == ({"name": "1", "reason": "its kernel is 1x1: select it with where="},)
    assert "1 convolutions expanded, 36 parameters added" in str(report)
    assert "1 skipped\n  1: its kernel is 1x1" in str(report)
