"""Policies, and proofs: their text, what they reject, and where they are inconclusive."""

import json
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg.collapse import api, rewrite
from repvgg.collapse.cost import Cost
from repvgg.collapse.graph_rewriter import ForwardRewriter, give_forward
from repvgg.errors import EquivalenceError, NothingFoldedWarning, UsageError
from tests.collapse.models import Branches, Linear2d, assert_same_outputs, conv, image, module, trained


def wide():
    """10 240 weights, and 2 304 when merged."""
    return nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 3), nn.ReLU())


def narrow():
    """5 120 weights, and 36 864 when merged."""
    return nn.Sequential(nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 3), nn.ReLU())


def separable():
    return nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU())


def joined(act=F.relu):
    """144 weights, and 288 when merged."""
    parts = {"conv": conv(), "bn": nn.BatchNorm2d(8)}
    return module(lambda self, x: act(self.bn(torch.cat([self.conv(x), x], 1))), **parts)


def parts_of(report):
    return [[part.name for part in entry.parts] for entry in report.folded]


@pytest.mark.parametrize(
    ("make", "channels", "cheaper", "always"),
    [
        (wide, 16, [["0", "1"]], [["0", "1"]]),
        (narrow, 64, [], [["0", "1"]]),
        (separable, 16, [["1", "2"]], [["0", "1", "2"]]),
        (joined, 4, [], [["conv", "cat", "bn"]]),
    ],
)
def test_the_named_policies(make, channels, cheaper, always):
    model, x = trained(make()), image(channels)
    plain, report = repvgg.reparameterize(model, policy="always")
    assert parts_of(report) == always
    assert_same_outputs(model, plain, x)
    if not cheaper:
        with pytest.warns(NothingFoldedWarning):
            plain, report = repvgg.reparameterize(model)
    else:
        plain, report = repvgg.reparameterize(model, policy="cheaper")
    assert parts_of(report) == cheaper
    assert_same_outputs(model, plain, x)
    assert repvgg.is_plain(plain) is (make is not joined)
    for entry in report.folded:
        assert entry.multiply_adds_after <= entry.multiply_adds_before
        assert entry.parameters_after <= entry.parameters_before


@pytest.mark.parametrize("act", [lambda x: x, F.relu], ids=["end", "relu"])
def test_norm_skipped_for_its_cost_is_reported(act):
    with pytest.warns(NothingFoldedWarning):
        _, report = repvgg.reparameterize(trained(joined(act)))
    assert report.left[0].name == "bn"
    assert "merging it would cost 2 times the multiply-adds and 288 instead of 144 weights" in report.left[0].reason


@pytest.mark.filterwarnings("ignore::repvgg.errors.NothingFoldedWarning")
def test_the_cost_is_reported_although_the_input_of_the_norm_is_not_folded_either():
    def forward(self, x):
        x = self.conv(x)
        y = F.relu(x)  # its input has other readers, which are linear
        return (self.norm(y) + self.up(self.down(y))) * (x * 2) * (x + 1)

    parts = {"norm": nn.BatchNorm2d(8), "down": conv(8, 1, kernel=1), "up": conv(1, 8, kernel=1)}
    _, report = repvgg.reparameterize(trained(module(forward, conv=conv(4, 8), **parts)), image())
    assert report.left[0].name == "norm"
    assert "merging it would cost" in report.left[0].reason


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize(
    ("make", "channels", "before", "after"),
    [(wide, 16, 10240, 2304), (narrow, 64, 5120, 36864)],
    ids=["wide", "narrow"],
)
@pytest.mark.filterwarnings("ignore::repvgg.errors.NothingFoldedWarning")
def test_policy_function_decides(make, channels, before, after, answer):
    seen = set()

    def policy(*costs):
        seen.add(costs)
        return answer

    model = trained(make())
    plain, report = repvgg.reparameterize(model, policy=policy)
    assert seen == {(Cost(before, before), Cost(after, after))}
    assert parts_of(report) == ([["0", "1"]] if answer else [])
    assert_same_outputs(model, plain, image(channels))


def test_refusal_by_a_policy_function_is_reported():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.warns(NothingFoldedWarning):
        _, report = repvgg.reparameterize(trained(model), policy=lambda before, after: False)
    assert "merging it would cost" in report.left[0].reason


def test_unknown_policy_raises():
    with pytest.raises(UsageError, match="policy must be 'cheaper', 'always' or a function of two costs, got 'best'"):
        repvgg.reparameterize(trained(wide()), policy="best")


def test_no_proofs_with_prove_false(monkeypatch):
    def never(*_, **__):
        raise AssertionError("prove=False must not prove anything")

    for place, name in ((api, "prove_module"), (rewrite, "prove_region")):
        monkeypatch.setattr(place, name, never)
    model = trained(nn.Sequential(Branches(), Linear2d(), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)))
    plain, report = repvgg.reparameterize(model, prove=False)
    assert len(report.folded) == 3
    assert {entry.proof for entry in report.folded} == {report.proof} == {""}
    assert_same_outputs(model, plain, image())
    with pytest.raises(AssertionError, match="must not prove"):
        repvgg.reparameterize(model)


class Gate(Linear2d):
    """Multiply by a steep sigmoid, which amplifies rounding errors."""

    def forward(self, x):
        y = super().forward(x)
        return y * torch.sigmoid(30 * y.flip(1)) * 2.5 + x


def chaos():
    return module(lambda self, x: torch.sin(10 * self.bn(self.conv(x))), conv=conv(kernel=1), bn=nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("make", "layers", "text"),
    [
        (Gate, 60, "relative error"),
        (chaos, 10, "no more than rounding of its input explains"),
        (chaos, 30, "not run on its own: rounding its input changes its output by"),
    ],
)
def test_rounding_sensitive_models_do_not_fail_the_proof(make, layers, text):
    model = trained(nn.Sequential(*(make() for _ in range(layers))))
    _, report = repvgg.reparameterize(model)
    assert len(report.folded) == layers
    assert report.left == ()
    assert text in report.proof


def raise_when_run(rewriter):
    graph = rewriter.module.graph
    end = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(end):
        end.args = (graph.call_function(operator.getitem, (end.args[0], 10**6)),)
    give_forward(rewriter.module, graph)


def shift_output(rewriter):
    for conv_ in rewriter.new.values():
        conv_.bias.data += 1


def corrupt_forwards(monkeypatch, corrupt):
    """Make every new forward wrong."""
    finish = ForwardRewriter.finish

    def corrupted(self):
        finish(self)
        corrupt(self)

    monkeypatch.setattr(ForwardRewriter, "finish", corrupted)


@pytest.mark.parametrize(
    ("corrupt", "text"), [(raise_when_run, "does not run (IndexError"), (shift_output, "relative error")]
)
@pytest.mark.parametrize("wrap", [False, True])
def test_unequal_new_forward_is_not_returned(monkeypatch, corrupt, text, wrap):
    corrupt_forwards(monkeypatch, corrupt)
    model = trained(nn.Sequential(Branches(), Linear2d()) if wrap else Branches())
    plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    assert [entry.name for entry in report.folded] == (["0.a", "1"] if wrap else ["a"])
    reason = {entry.name: entry.reason for entry in report.left}["0" if wrap else ""]
    assert "its new forward is not equal to the old one" in reason
    assert text in reason


@pytest.mark.parametrize("corrupt", [raise_when_run, shift_output])
def test_forward_stays_if_its_only_region_fails(monkeypatch, corrupt):
    corrupt_forwards(monkeypatch, corrupt)
    model = trained(module(lambda self, x: F.relu(self.a(x) + self.b(x)), a=conv(), b=conv(kernel=1)))
    with pytest.warns(NothingFoldedWarning):
        plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image())
    assert "is not equal to the old one" in report.left[0].reason


def test_unequal_model_without_an_unequal_forward_raises(monkeypatch):
    insert_in_place = rewrite._PlanApplier._insert_in_place

    def corrupted(self, scope, region, conv_, rewriters):
        conv_.bias += 1
        return insert_in_place(self, scope, region, conv_, rewriters)

    monkeypatch.setattr(rewrite._PlanApplier, "_insert_in_place", corrupted)
    with pytest.raises(EquivalenceError, match="though each of its regions is"):
        repvgg.reparameterize(trained(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())))


def test_the_report_is_data_and_text():
    _, report = repvgg.reparameterize(trained(nn.Sequential(Branches(), nn.BatchNorm2d(4), conv())))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["proof"] == report.proof
    assert data["folded"][0]["proof"].startswith("relative error")
    assert str(report).splitlines()[-1] == f"the whole model: {report.proof}"
    assert "relative error" in report.proof


def test_inputs_that_the_forward_does_not_determine_are_made_up():
    model = trained(nn.Sequential(nn.ReLU(), Linear2d()))
    _, report = repvgg.reparameterize(model)
    assert report.proof.startswith("relative error")  # inputs are made up
    assert report.proof in str(report)
    _, report = repvgg.reparameterize(model, image())
    assert report.proof.startswith("relative error")
    assert report.proof.endswith("on the given inputs")


def test_several_inputs():
    model = trained(module(lambda self, x, y: self.a(x) * F.relu(y) + self.b(F.relu(y)), a=Linear2d(), b=Linear2d()))
    plain, report = repvgg.reparameterize(model, [image(), image(seed=2)])
    assert report.proof.startswith("relative error")
    assert_same_outputs(model, plain, image(), image(seed=2))
    _, report = repvgg.reparameterize(model)
    assert report.proof.startswith("relative error")
