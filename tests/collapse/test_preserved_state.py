"""Stored attributes, hooks, modes and random states are the same in the plain model and unchanged in the original."""

import random
import threading
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import ReparamError
from tests.collapse.models import (
    Block,
    Branches,
    Linear2d,
    assert_same_outputs,
    check,
    collapse,
    conv,
    image,
    module,
    trained,
)

STORE = []


def in_an_attribute(self, x):
    self.stored = self.conv(x)
    return F.relu(self.bn(self.stored))


def in_a_nested_container(self, x):
    y = self.conv(x)
    self.store["seen"].append(y)
    return F.relu(self.bn(y))


def in_an_object(self, x):
    self.space.stored = self.conv(x)
    return F.relu(self.bn(self.space.stored))


def in_a_global(self, x):
    y = self.conv(x)
    STORE.append(y)
    return F.relu(self.bn(y))


@pytest.mark.parametrize("forward", [in_an_attribute, in_a_nested_container, in_an_object, in_a_global])
def test_attributes_stored_by_a_forward_are_the_same(forward):
    model = module(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    model.store, model.space = {"seen": []}, SimpleNamespace(stored=None)
    plain, report = collapse(trained(model))
    STORE.clear()
    assert model.store == {"seen": []}
    assert model.space.stored is None
    assert "its input 'conv' is not folded: its output is stored" in report.left[0].reason
    assert_same_outputs(model, plain, image())
    stored = [model.store["seen"], plain.store["seen"]] if model.store["seen"] else [STORE[::2], STORE[1::2]]
    stored = stored if stored[0] else [[getattr(m, "stored", m.space.stored)] for m in (model, plain)]
    torch.testing.assert_close(*stored, rtol=1e-12, atol=1e-12)


def test_forward_that_stores_something_is_not_rewritten():
    def forward(self, x):
        self.stored = self.a(x) + self.b(x)
        return F.relu(self.stored)

    plain, report = check(trained(module(forward, a=Linear2d(), b=conv())), image())
    assert [entry.name for entry in report.folded] == ["a"]
    assert plain.stored is not None


def test_linear_module_that_stores_its_output_is_kept():
    def forward(self, x):
        self.last = self.bn(self.conv(x))
        return self.last

    inner = module(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    plain, report = check(
        trained(module(lambda self, x: F.relu(self.inner(x)) + self.inner.last, inner=inner)), image()
    )
    assert [entry.name for entry in report.folded] == ["inner.conv"]
    assert plain.inner.last is not None


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("path", ["1.conv", "1", "0", "0.act", "0.b", ""])
def test_hooks_observe_and_modify_the_same_tensors(register, path):
    seen = []

    def hook(owner, *values):
        if "backward" in register:
            seen.append(values[1][0])
            return None
        changed = values[-1] if isinstance(values[-1], torch.Tensor) else values[-1][0]
        seen.append(changed)
        return changed * 2

    model = trained(nn.Sequential(Branches(), Block(inplace=False)))
    getattr(model.get_submodule(path), register)(hook)
    plain, _ = collapse(model)
    assert seen == []  # neither the trace nor the proof runs hooks
    for part in (model, plain):
        part(image().requires_grad_()).sum().backward()
    assert len(seen) == 2
    torch.testing.assert_close(*seen, rtol=1e-11, atol=1e-11)


def test_random_state_is_preserved_and_not_frozen():
    def forward(self, x):
        noise = torch.rand(4, 1, 1).to(x) + random.random()
        return F.relu(self.a(x) + self.b(x)) + noise

    model = trained(module(forward, a=Linear2d(), b=conv()))
    plain, report = collapse(model)  # compares random states before and after
    assert [entry.name for entry in report.folded] == ["a"]  # its chain is merged, but not its branches
    torch.manual_seed(3)
    random.seed(3)
    expected = model(image())
    torch.manual_seed(3)
    random.seed(3)
    torch.testing.assert_close(plain(image()), expected, rtol=1e-11, atol=1e-11)


def test_results_of_an_earlier_run_are_copied():
    model = trained(Branches())
    model.features = [model.b.weight * 2]  # not a leaf tensor: deepcopy raises on it
    plain, report = check(model, image())
    assert len(report.folded) == 1
    torch.testing.assert_close(plain.features, [model.features[0].detach()], rtol=0, atol=0)


def test_uncopyable_attribute_is_named():
    model = trained(nn.Sequential(Branches()))
    model[0].lock = threading.Lock()
    with pytest.raises(ReparamError, match="'lock' of 0 "):
        repvgg.reparameterize(model)


def test_modules_with_their_own_deepcopy_are_skipped():
    class Own(Block):
        def __deepcopy__(self, memo):
            new = Own()
            new.load_state_dict(self.state_dict())
            return new.double().train(self.training)

    _, report = check(trained(nn.Sequential(Branches(), Own())), image())
    assert len(report.folded) == 1
    assert "__deepcopy__" in report.left[0].reason


def test_a_forward_replaced_on_the_instance_is_what_runs():
    block, other = Block(), Linear2d()
    block.forward = MethodType(lambda self, x: self.act(self.conv(x)), block)
    class_forward = other.forward
    other.forward = lambda x: class_forward(x) * 2
    _, report = check(trained(nn.Sequential(block, other, Branches())), image())
    assert [entry.name for entry in report.folded] == ["2.conv"]


def test_autocast_and_no_grad_inside_a_forward_are_not_lost():
    def guarded(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.a(x.float()) + self.b(x.float()))

    model = trained(module(guarded, a=Linear2d(), b=conv()), torch.float32)
    plain, _ = repvgg.reparameterize(model)
    with torch.autocast("cpu"):
        assert model(image(dtype=torch.float32)).dtype is torch.float32
        assert plain(image(dtype=torch.float32)).dtype is torch.float32

    def frozen(self, x):
        with torch.no_grad():
            y = self.a(x)
        return F.relu(y + self.b(x))

    model = trained(module(frozen, a=Linear2d(), b=conv()))
    plain, _ = check(model, image())
    grads = []
    for part in (model, plain):
        x = image().requires_grad_()
        part(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


def test_training_only_parts_are_dropped_if_nothing_else_can_reach_them():
    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)

    model = trained(module(forward, body=Branches(), head=Block(), aux=Block()))
    plain, report = check(model, image())
    assert [entry.name for entry in report.dropped] == ["aux"]
    assert plain.aux is None
    assert model.aux is not None


def test_a_training_only_name_of_something_that_runs_is_not_dropped():
    def forward(self, x):
        return (self.body(x), self.alias(x)) if self.training else self.body(x)

    block = Block()
    _, report = check(trained(module(forward, alias=block, body=nn.Sequential(block, Branches()))), image())
    assert report.dropped == ()


def test_a_part_whose_parameter_is_read_only_is_not_dropped_and_costs_no_merge():
    def forward(self, x):
        width = len(self.embedding.weight)  # no function is called, so that a recording shows nothing
        return F.relu(self.bn(self.conv(x))) / width

    model = trained(module(forward, conv=conv(), bn=nn.BatchNorm2d(4), embedding=nn.Embedding(3, 4)))
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1
    assert report.dropped == ()
    assert [skipped.name for skipped in report.left] == ["embedding"]
    assert_same_outputs(model, plain, image())


def test_training_only_part_used_by_the_outer_model_is_not_dropped():
    def inner(self, x):
        return (self.head(x), self.aux(x)) if self.training else self.head(x)

    model = module(lambda self, x: self.inner(x) + self.inner.aux(x), inner=module(inner, head=Block(), aux=Branches()))
    _, report = check(trained(model), image())
    assert report.dropped == ()


def test_modes_of_mode_independent_modules_are_kept():
    model = trained(nn.Sequential(Branches(), Block()))
    model.training = model[0].act.training = True
    plain, _ = collapse(model)
    assert {name for name, part in plain.named_modules() if part.training} == {"", "0.act"}
