"""Forwards that something other than an argument steers: attributes, global variables, closures, configurations."""

import contextvars
import copy
import enum
import os
import pickle
import warnings
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.errors import NothingFoldedWarning, UsageError
from tests.collapse.models import assert_same_outputs, conv, image, module, trained


class Mode(enum.Enum):
    FULL, SHORT = 1, 2


class Config:
    short = False


SHORT = False
KIND = "full"
LEVEL = 3
SCALE = 2.0
OPTIONS = {"short": False}
SETTINGS = SimpleNamespace(inner=SimpleNamespace(mode=Mode.FULL))
HOOKS: list[str] = []
CALLS = 0
CONTEXT = contextvars.ContextVar("short", default=False)


def parts():
    return {"conv": conv(), "bn": nn.BatchNorm2d(4), "act": nn.ReLU(), "other": conv(kernel=1)}


def by_global(self, x):
    y = self.conv(x)
    return self.act(y if SHORT else self.bn(y))


def by_local_name(self, x):
    kind = KIND
    y = self.conv(x)
    if kind == "short":
        return self.act(y)
    return self.act(self.bn(y))


def by_number(self, x):
    y = self.conv(x)
    return self.act(self.bn(y) if LEVEL > 2 else y)


def by_factor(self, x):
    return self.act(self.bn(self.conv(x)) * SCALE + self.other(x))


def by_item(self, x):
    y = self.conv(x)
    return self.act(y if OPTIONS["short"] else self.bn(y))


def by_get(self, x):
    y = self.conv(x)
    return self.act(y if OPTIONS.get("short", False) else self.bn(y))


def by_nested_attribute(self, x):
    y = self.conv(x)
    return self.act(y if SETTINGS.inner.mode is Mode.SHORT else self.bn(y))


def by_class(self, x):
    y = self.conv(x)
    return self.act(y if Config.short else self.bn(y))


def by_list(self, x):
    y = self.conv(x)
    return self.act(y if "short" in HOOKS else self.bn(y))


def chosen(y, norm):
    return y if SHORT else norm(y)


def by_helper(self, x):
    return self.act(chosen(self.conv(x), self.bn))


def by_lambda(self, x):
    choose = lambda y: y if SHORT else self.bn(y)  # noqa: E731 - another code object
    return self.act(choose(self.conv(x)))


@pytest.mark.parametrize(
    ("forward", "name", "value"),
    [
        (by_global, "SHORT", True),
        (by_local_name, "KIND", "short"),
        (by_number, "LEVEL", 1),
        (by_factor, "SCALE", 3.0),
        (by_item, "OPTIONS", {"short": True}),
        (by_get, "OPTIONS", {"short": True}),
        (by_nested_attribute, "SETTINGS", SimpleNamespace(inner=SimpleNamespace(mode=Mode.SHORT))),
        (by_class, "Config", type("Config", (), {"short": True})),
        (by_list, "HOOKS", ["short"]),
        (by_helper, "SHORT", True),
        (by_lambda, "SHORT", True),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_global_variable_that_selects_is_checked(forward, name, value, monkeypatch):
    model = trained(module(forward, **parts()))
    plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    assert len(report.folded) == 1
    assert [f"the global {name}" in guard.reason for guard in report.guards] == [True]
    copies = [plain, copy.deepcopy(plain)]
    monkeypatch.setitem(globals(), name, value)
    for one in copies:
        with pytest.raises(UsageError, match=f"collapsed for the global {name}.*: collapse the model with the other"):
            one(image())
    with warnings.catch_warnings(action="ignore", category=NothingFoldedWarning):
        other, _ = repvgg.reparameterize(model)
    assert_same_outputs(model, other, image())


def test_values_inside_a_global_object(monkeypatch):
    for forward, holder in ((by_item, OPTIONS), (by_nested_attribute, SETTINGS.inner), (by_class, Config)):
        model = trained(module(forward, **parts()))
        plain, _ = repvgg.reparameterize(model)
        with monkeypatch.context() as patch:
            if isinstance(holder, dict):
                patch.setitem(holder, "short", True)
            elif holder is Config:
                patch.setattr(holder, "short", True)
            else:
                patch.setattr(holder, "mode", Mode.SHORT)
            with pytest.raises(UsageError, match="was collapsed for the global"):
                plain(image())
        assert_same_outputs(model, plain, image())


def by_text_attribute(self, x):
    y = self.conv(x)
    return self.act(y if self.kind == "short" else self.bn(y))


def by_hidden_flag(self, x):
    y = self.conv(x)
    return self.act(y if self._short else self.bn(y))


def by_config(self, x):
    y = self.conv(x)
    return self.act(y if self.config.short else self.bn(y))


def by_depth(self, x):
    y = self.conv(x)
    return self.act(self.bn(y) if self.depth > 2 else y)


@pytest.mark.parametrize(
    ("forward", "values", "change"),
    [
        (by_text_attribute, {"kind": "full"}, lambda plain: setattr(plain, "kind", "short")),
        (by_hidden_flag, {"_short": False}, lambda plain: setattr(plain, "_short", True)),
        (by_config, {"config": SimpleNamespace(short=False)}, lambda plain: setattr(plain.config, "short", True)),
        (by_depth, {"depth": 3}, lambda plain: setattr(plain, "depth", 1)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_attributes_that_select_are_checked(forward, values, change):
    model = module(forward, **parts())
    for name, value in values.items():
        setattr(model, name, value)
    model = trained(model)
    plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    assert len(report.folded) == len(report.guards) == 1
    change(plain)
    with pytest.raises(UsageError, match="was collapsed for"):
        plain(image())


def with_closure():
    short = False

    def forward(self, x):
        y = self.conv(x)
        return self.act(y if short else self.bn(y))

    def switch(value):
        nonlocal short
        short = value

    return forward, switch


def test_a_variable_of_an_enclosing_function():
    forward, switch = with_closure()
    model = trained(module(forward, **parts()))
    plain, report = repvgg.reparameterize(model)
    assert [guard.reason for guard in report.guards] == ["the variable short=False"]
    assert_same_outputs(model, plain, image())
    switch(True)
    with pytest.raises(UsageError, match="the variable short=False"):
        plain(image())


def test_a_forward_that_was_replaced_on_the_instance(monkeypatch):
    model = trained(module(lambda self, x: x, **parts()))
    model.forward = MethodType(by_global, model)
    plain, report = repvgg.reparameterize(model)
    assert len(report.folded) == 1
    assert_same_outputs(model, plain, image())
    monkeypatch.setitem(globals(), "SHORT", True)
    with pytest.raises(UsageError, match="the global SHORT=False"):
        plain(image())


def choose(y, norm):
    return y if SHORT else norm(y)


def by_stored_function(self, x):
    return self.act(self.choose(self.conv(x), self.bn))


def by_function_of_a_class(self, x):
    return self.act(Helper.choose(self.conv(x), self.bn))


class Helper:
    choose = staticmethod(choose)


@pytest.mark.parametrize("forward", [by_stored_function, by_function_of_a_class])
def test_functions_that_a_forward_calls(forward, monkeypatch):
    model = trained(module(forward, **parts()))
    model.choose = choose
    plain, _ = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    monkeypatch.setitem(globals(), "SHORT", True)
    with pytest.raises(UsageError, match="the global SHORT=False"):
        plain(image())


def by_range(self, x):
    for _ in range(self.times):
        x = self.act(self.bn(self.conv(x)))
    return x


def by_index(self, x):
    return self.act(self.bn([self.conv, self.other][self.index](x)))


@pytest.mark.parametrize(("forward", "name", "value"), [(by_range, "times", 1), (by_index, "index", 0)])
def test_numbers_that_count_or_select(forward, name, value):
    model = module(forward, **parts())
    setattr(model, name, value)
    model = trained(model)
    plain, report = repvgg.reparameterize(model, image())
    assert_same_outputs(model, plain, image())
    setattr(plain, name, 1 - value)
    if not report.folded:
        setattr(model, name, 1 - value)
        assert_same_outputs(model, plain, image())
    else:
        with pytest.raises(UsageError, match=name):
            plain(image())


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        for name, part in parts().items():
            setattr(self, name, part)

    def forward(self, x):
        return by_global(self, x)


class Derived(Base):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_forward_of_a_base_class(monkeypatch):
    model = trained(Derived())
    plain, _ = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    monkeypatch.setitem(globals(), "SHORT", True)
    with pytest.raises(UsageError, match="the global SHORT=False"):
        plain(image())


def test_stored_models_check_as_well(monkeypatch):
    plain, _ = repvgg.reparameterize(trained(Base()))
    stored = pickle.loads(pickle.dumps(plain))
    assert_same_outputs(plain, stored, image())
    monkeypatch.setitem(globals(), "SHORT", True)
    with pytest.raises(UsageError, match="the global SHORT=False"):
        stored(image())


def test_a_variable_that_the_forward_itself_changes(monkeypatch):
    """A check would refuse the second call, so that the part stays."""

    def forward(self, x):
        global CALLS
        CALLS += 1
        y = self.conv(x)
        return F.relu(self.bn(y)) if CALLS < 10 else F.relu(y)

    monkeypatch.setitem(globals(), "CALLS", 0)
    model = trained(module(forward, **parts()))
    with pytest.warns(NothingFoldedWarning):
        _, report = repvgg.reparameterize(model, prove=False)
    assert "the global CALLS, which it may change" in report.left[0].reason


def test_a_module_that_another_value_runs_is_checked(monkeypatch):
    def forward(self, x):
        return self.act(self.bn(self.conv(x)) if not SHORT else self.other(x))

    model = trained(module(forward, **parts()))
    plain, report = repvgg.reparameterize(model, image())
    assert [skipped.name for skipped in report.dropped] == ["other"]
    monkeypatch.setitem(globals(), "SHORT", True)
    with pytest.raises(UsageError, match="the global SHORT=False"):
        plain(image())


class OfClass(nn.Module):
    short = False

    def __init__(self):
        super().__init__()
        for name, part in parts().items():
            self.add_module(name, part)

    def forward(self, x):
        y = self.conv(x)
        return self.act(y if type(self).short else self.bn(y))


class ByClassMethod(OfClass):
    @classmethod
    def is_short(cls):
        return cls.short

    def forward(self, x):
        y = self.conv(x)
        return self.act(y if self.is_short() else self.bn(y))


class ByConfig(OfClass):
    config = SimpleNamespace(short=False)

    def forward(self, x):
        y = self.conv(x)
        return self.act(y if self.config.short else self.bn(y))


class ByEnvironment(OfClass):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y if os.environ.get("SHORT") == "1" else self.bn(y))


class ByContext(OfClass):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y if CONTEXT.get() else self.bn(y))


CHANGES = {
    OfClass: lambda monkeypatch: monkeypatch.setattr(OfClass, "short", True),
    ByClassMethod: lambda monkeypatch: monkeypatch.setattr(OfClass, "short", True),
    ByConfig: lambda monkeypatch: monkeypatch.setattr(ByConfig.config, "short", True),
    ByEnvironment: lambda monkeypatch: monkeypatch.setenv("SHORT", "1"),
    ByContext: lambda monkeypatch: CONTEXT.set(True),
}


@pytest.mark.parametrize("kind", CHANGES, ids=lambda kind: kind.__name__)
def test_the_class_the_environment_and_the_context_are_checked(kind, monkeypatch):
    model = trained(kind())
    plain, report = repvgg.reparameterize(model)
    assert report.folded
    stored = pickle.loads(pickle.dumps(plain))
    assert_same_outputs(model, plain, image())

    def call_all():
        CHANGES[kind](monkeypatch)
        for one in (plain, stored):
            with pytest.raises(UsageError, match=r"was collapsed for .*: collapse the model with the other value"):
                one(image())

    contextvars.copy_context().run(call_all)


class ByGradients(OfClass):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y if torch.is_grad_enabled() else self.bn(y))


class ByRequiresGrad(OfClass):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y if x.requires_grad else self.bn(y))


class ByLayout(OfClass):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y if x.is_contiguous(memory_format=torch.channels_last) else self.bn(y))


@pytest.mark.filterwarnings("ignore::repvgg.errors.NothingFoldedWarning")
@pytest.mark.parametrize("kind", [ByGradients, ByRequiresGrad, ByLayout], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("inputs", [None, image()], ids=["made up", "given"])
def test_gradients_and_layout_that_select_keep_the_norm(kind, inputs):
    model = trained(kind())
    plain, report = repvgg.reparameterize(model, inputs)
    assert [skipped.name for skipped in report.left] == ["bn"]
    for x in (image(), image().requires_grad_(), image().to(memory_format=torch.channels_last)):
        torch.testing.assert_close(plain(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(plain(x), model(x))


class Contiguous(OfClass):
    def forward(self, x):
        if not x.is_contiguous():
            x = x.contiguous()
        return self.act(self.bn(self.conv(x)))


def test_a_layout_that_selects_nothing_folds():
    model = trained(Contiguous())
    plain, report = repvgg.reparameterize(model)
    assert len(report.folded) == 1
    assert not report.left
    assert not any("tensor" in guard.reason for guard in report.guards)
    assert_same_outputs(model, plain, image().transpose(2, 3))


class ByExport(OfClass):
    def forward(self, x):
        y = self.conv(x)
        return self.act(y if torch.onnx.is_in_onnx_export() else self.bn(y))


@pytest.mark.filterwarnings("ignore::repvgg.errors.NothingFoldedWarning")
def test_an_export_that_selects_never_changes_an_answer(monkeypatch):
    model = trained(ByExport())
    plain, report = repvgg.reparameterize(model)
    assert [skipped.name for skipped in report.left] == ["bn"]
    assert "is being exported" in report.left[0].reason
    folded, report = repvgg.reparameterize(model, image())
    assert report.folded
    assert any("is_in_onnx_export()=False" in guard.reason for guard in report.guards)
    assert_same_outputs(model, folded, image())
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert_same_outputs(model, plain, image())
    with pytest.raises(UsageError, match="is_in_onnx_export"):
        folded(image())
