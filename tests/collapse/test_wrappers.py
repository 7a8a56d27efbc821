"""Wrapped, scripted and compiled models, and what the report says about them."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import repvgg
from repvgg.collapse import proof
from tests.collapse.models import (
    Block,
    Branches,
    Linear2d,
    assert_same_outputs,
    check,
    conv,
    image,
    module,
    trained,
)


def scripted():
    return torch.jit.script(trained(nn.Sequential(conv(), nn.BatchNorm2d(4))))


MAKERS = {
    "script inside": (lambda: module(lambda self, x: self.b(self.a(x)), a=Branches(), b=scripted()), 1),
    "trace inside": (lambda: nn.Sequential(Branches(), torch.jit.trace(trained(Block()), image()), Linear2d()), 2),
    "graph": (lambda: fx.symbolic_trace(trained(nn.Sequential(Branches(), Block()))), 2),
    "graph inside": (lambda: nn.Sequential(fx.symbolic_trace(trained(Branches())), Block()), 2),
    "parallel": (lambda: nn.DataParallel(nn.Sequential(Branches(), Block())), 2),
    "parallel inside": (lambda: nn.Sequential(Branches(), nn.DataParallel(Branches())), 2),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", MAKERS)
def test_other_kinds_of_models(name):
    make, folded = MAKERS[name]
    _, report = check(trained(make()), image())
    assert len(report.folded) == folded


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_script_module_is_kept():
    model = scripted()
    with pytest.warns(repvgg.errors.NothingFoldedWarning):
        plain, _ = repvgg.reparameterize(model)
    torch.testing.assert_close(plain(image()), model(image()), rtol=0, atol=0)


def test_compiled_models_and_parts():
    model = trained(nn.Sequential(Branches(), Block()))
    plain, report = repvgg.reparameterize(torch.compile(model, backend="eager"))
    assert_same_outputs(model, plain, image())
    assert [entry.name for entry in report.folded] == ["0.conv", "1.conv"]
    outer = trained(nn.Sequential(Branches(), torch.compile(Branches(), backend="eager")))
    plain, report = repvgg.reparameterize(outer)
    assert_same_outputs(outer, plain, image())
    assert [entry.name for entry in report.folded] == ["0.conv", "1.conv"]


def test_every_region_and_the_model_are_proven():
    plain, report = check(trained(nn.Sequential(Branches(), Block())), image())
    assert all(entry.proof.startswith("relative error ") for entry in report.folded)
    assert report.proof.startswith("relative error ")
    assert report.proof in str(report)
    assert isinstance(plain[0], Branches)
    assert type(plain[1]) is Block
    _, report = repvgg.reparameterize(trained(nn.Sequential(Branches(), Block())), prove=False)
    assert [entry.proof for entry in report.folded] == ["", ""]
    assert report.proof == ""


@pytest.mark.parametrize("mistake", [1e-9, float("nan")])
def test_a_region_that_fails_its_proof_stays_as_it_was(monkeypatch, mistake):
    real, calls = proof.run_in_float64, []

    def run(convolution, image):
        calls.append(1)
        wrong = len(calls) == 1  # the first region
        return real(convolution, image) * (1 + mistake if wrong else 1)

    monkeypatch.setattr(proof, "run_in_float64", run)
    model = trained(nn.Sequential(Branches(), Block()))
    plain, report = check_quietly(model)
    assert [entry.name for entry in report.folded] == ["1.conv"]
    assert type(plain[0]) is Branches
    assert {entry.name.split(".")[0] for entry in report.left} == {"0"}
    assert all("is not equal" in entry.reason for entry in report.left)


def test_model_that_fails_its_proof_is_not_returned(monkeypatch):
    class Wrong(proof.Comparison):
        def __init__(self, reference, candidate, calls, **options):
            super().__init__(reference, lambda x: candidate(x) * (1 + 1e-9), calls, **options)

    monkeypatch.setattr(proof, "Comparison", Wrong)
    with pytest.raises(repvgg.errors.EquivalenceError, match="not equal to the model"):
        repvgg.reparameterize(trained(nn.Sequential(Block(), Block())))


def check_quietly(model):
    plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    return plain, report


def test_nondeterministic_model_is_proven_region_by_region():
    def forward(self, x):
        return F.dropout(self.act(self.a(x) + self.b(x)), 0.5, training=True)

    model = trained(module(forward, a=Linear2d(), b=conv(), act=nn.ReLU()))
    plain, report = repvgg.reparameterize(model)
    assert [entry.name for entry in report.folded] == ["conv"]
    assert "outputs vary between runs" in report.proof
    outcomes = []
    for part in (model, plain):
        torch.manual_seed(0)
        outcomes.append(part(image()))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("why", ["channels", "size"])
def test_model_that_needs_inputs_is_reported_and_proven_on_given_inputs(why):
    def forward(self, x, y):
        scores = y.sum() if why == "channels" else self.fixed(x.flatten(1)).sum()
        return self.act(self.a(x) + self.b(x)) * scores

    model = trained(module(forward, a=Linear2d(), b=conv(), act=nn.ReLU(), fixed=nn.Linear(4 * 13 * 18, 2)))
    plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image(), image())
    assert report.folded[0].proof.startswith("relative error ")
    _, report = repvgg.reparameterize(model, (image(), image()))
    assert report.proof.startswith("relative error ")


def test_proof_with_two_inputs():
    def forward(self, x, y):
        return {"a": self.act(self.a(x) + self.b(x)), "b": [self.act(self.c(y)), 3]}

    model = trained(module(forward, a=Linear2d(), b=conv(), c=nn.Conv2d(6, 2, 1), act=nn.ReLU()))
    _, report = check(model, image(), image(6))
    assert report.proof.startswith("relative error ")


def test_proof_uses_larger_images_if_small_ones_shrink_to_nothing():
    def forward(self, x):
        return self.pool(self.act(self.a(x) + self.b(x)))

    model = trained(module(forward, a=Linear2d(), b=conv(), act=nn.ReLU(), pool=nn.MaxPool2d(12)))
    _, report = check(model, image())
    assert report.proof.startswith("relative error ")


def test_every_surviving_norm_has_a_valid_path_and_a_reason():
    model = nn.Sequential(
        Branches(),
        nn.Sequential(nn.BatchNorm2d(4), conv(), nn.ReLU()),
        nn.Sequential(nn.Linear(18, 18), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    )
    plain, report = repvgg.reparameterize(trained(model))
    assert_same_outputs(model, plain, image())
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons.keys() == {"1.0", "2.1", "3.1"}
    assert "leaks into the padding" in reasons["1.0"]
    assert "pass inputs=" in reasons["2.1"]
    assert "running statistics" in reasons["3.1"]
    assert all(isinstance(plain.get_submodule(name), nn.BatchNorm2d) for name in reasons)


@pytest.mark.parametrize("inputs", [None, image()], ids=["made up", "given"])
def test_a_forward_that_was_replaced_and_runs_the_original(inputs):
    """The closure holds the model itself, so that the copy that is recorded runs the original's parameters."""
    model = trained(nn.Sequential(conv(), conv(kernel=1)))
    model.forward = lambda x: nn.Sequential.forward(model, x)
    assert not repvgg.is_plain(model, inputs)
    plain, report = repvgg.reparameterize(model, inputs)
    assert_same_outputs(model, plain, image())
    assert len(report.folded) == 1
    assert repvgg.is_plain(plain, inputs)
