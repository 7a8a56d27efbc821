"""Modules whose results no output depends on: they are dropped where a recording shows that nothing else sees them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.errors import NothingFoldedWarning, UsageError
from tests.collapse.models import Block, check, conv, image, module, trained

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def head(forward, **parts):
    """A network with an auxiliary head."""
    return trained(module(forward, main=Block(), last=conv(), aux=nn.Sequential(Block(), conv(4, 3)), **parts))


def check_dropped(model, *, x=None):
    """Assert that the auxiliary head is dropped, with a line in the report, and that the results are the same."""
    x = image() if x is None else x
    plain, report = repvgg.reparameterize(model, x)
    assert [(entry.name, entry.reason) for entry in report.dropped] == [
        ("aux", "it is computed, but no output depends on the result")
    ]
    assert list(plain.aux.parameters()) == []
    assert "dropped" in str(report)
    for given in (x, image(4, 24, 27)):
        assert_close(plain(given.clone()), model(given.clone()), **EXACT)
    assert_close(copy.deepcopy(plain)(x), model(x), **EXACT)
    with pytest.warns(NothingFoldedWarning):
        _, second = repvgg.reparameterize(plain, x)
    assert second.dropped == ()
    return plain, report


def check_kept(model):
    """Assert that no part is dropped, and that the results are the same."""
    plain, report = repvgg.reparameterize(model, image())
    assert report.dropped == ()
    assert list(plain.aux.parameters())
    assert_close(plain(image()), model(image()), **EXACT)
    return plain


def test_a_head_whose_result_is_not_returned():
    def forward(self, x):
        y = self.main(x)
        extra = torch.cat([self.aux(y).view(y.shape[0], 3, -1), y.flatten(2)], 1).sigmoid_()
        outputs = {"main": self.last(y), "extra": extra}
        return outputs["main"]

    model = head(forward)
    plain, report = check_dropped(model)
    assert [entry.name for entry in report.folded] == ["main.conv"]
    assert plain.aux(image()).shape == (2, 3, 13, 18)
    assert bool(plain.aux(image()).isnan().all())
    plain, report = check(model, image())  # nor without inputs: the forward has no other branch
    assert [entry.name for entry in report.dropped] == ["aux"]
    assert repvgg.is_plain(plain)


def test_a_layer_and_vectors():
    def forward(self, x):
        y = self.main(x)
        self.aux(y.mean((2, 3)))
        return self.last(y)

    check_dropped(trained(module(forward, main=Block(), last=conv(), aux=nn.Linear(4, 7))))


def test_a_flag_that_returns_the_result_is_guarded():
    def forward(self, x):
        y = self.main(x)
        extra = self.aux(y)
        return self.last(y) if self.export else (self.last(y), extra)

    model = head(forward, export=True)
    plain, report = check_dropped(model)
    assert "export=True" in report.guards[0].reason
    plain.export = False
    with pytest.raises(UsageError, match="export=True"):
        plain(image())
    model.export = False
    check_kept(model)


def test_an_argument_that_returns_the_result():
    def forward(self, x, more=False):
        y = self.main(x)
        extra = self.aux(y)
        return (self.last(y), extra) if more else self.last(y)

    model = head(forward)
    plain, _ = check_dropped(model)
    with pytest.raises(UsageError):
        plain(image(), more=True)
    plain, report = repvgg.reparameterize(model)
    assert report.dropped == ()
    assert_close(plain(image(), True), model(image(), True), **EXACT)


def stores(self, x):
    self.kept = self.aux(x)
    return self.last(self.main(x))


def appends(self, x):
    _KEPT.append(self.aux(x))
    return self.last(self.main(x))


_KEPT = []


def decides(self, x):
    return self.last(self.main(x)) if self.aux(x).mean() < 1e9 else x


def measures(self, x):
    return self.last(self.main(x)) * self.aux(x).shape[1]


def reads_a_parameter(self, x):
    self.aux(x)
    return self.last(self.main(x)) * self.aux[1].weight.mean()


def calls_a_part(self, x):
    self.aux(x)
    return self.last(self.main(self.aux[0](x)))


def calls_it_twice(self, x):
    self.aux(x)
    return self.last(self.main(x)) + self.aux(torch.sin(x)).mean()


def returns_it_from_a_loop(self, x):
    outputs = [part(x) for part in (self.aux, self.last, self.main)]
    return outputs[::-1]


def halves_the_size(self, x):
    self.aux(x[:, :, ::2])
    return self.last(F.max_pool2d(self.main(x), 2))


@pytest.mark.parametrize(
    "forward",
    [stores, appends, decides, measures, reads_a_parameter, calls_a_part, calls_it_twice, returns_it_from_a_loop],
)
def test_what_something_reads_stays(forward):
    check_kept(head(forward))


def test_the_size_of_the_result_may_be_another_than_that_of_the_output():
    check_dropped(head(halves_the_size))


def unread(self, x):
    y = self.main(x)
    self.aux(y)
    return self.last(y)


def with_aux(forward, **parts):
    return trained(module(unread, main=Block(), last=conv(), aux=module(forward, conv=conv(), **parts)))


def test_random_numbers_stay():
    model = with_aux(lambda self, x: self.conv(x) + torch.rand_like(x))
    plain = check_kept(model)
    states = []
    for part in (model, plain):
        torch.manual_seed(0)
        part(image())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_write_to_what_is_read_stays():
    check_kept(with_aux(lambda self, x: x.add_(self.conv(x).mean())))


def test_a_counter_stays():
    def forward(self, x):
        self.calls += 1
        return self.conv(x)

    model = with_aux(forward, calls=0)
    plain = check_kept(model)
    before = plain.aux.calls
    plain(image())
    assert plain.aux.calls == before + 1


def test_a_buffer_that_is_updated_stays():
    def forward(self, x):
        self.seen += x.mean((0, 2, 3))
        return self.conv(x)

    model = with_aux(forward)
    model.aux.register_buffer("seen", torch.zeros(4).double())
    plain, report = repvgg.reparameterize(model, image())
    assert report.dropped == ()
    assert_close(plain.aux.seen, model.aux.seen)


@pytest.mark.parametrize("path", ["aux", "aux.0.bn"])
def test_hooks_stay(path):
    model = head(unread)
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    check_kept(model)


def test_a_public_method_that_calls_it_stays():
    model = head(unread)
    type(model).features = lambda self, x: self.aux(self.main(x))
    plain = check_kept(model)
    assert_close(plain.features(image()), model.features(image()), **EXACT)


def test_a_result_of_a_size_that_two_calls_do_not_show_stays():
    model = head(unread)
    model.aux = nn.Sequential(conv(stride=2), nn.BatchNorm2d(4))
    plain = check_kept(trained(model))
    assert isinstance(plain.aux, nn.Conv2d)


def test_code_that_reads_an_attribute_of_it_stays():
    def forward(self, x):
        self.aux(x)
        return torch.sigmoid(self.last(self.main(x))) * self.aux[1].out_channels

    check_kept(head(forward))


def test_a_branch_that_reads_it_for_large_images_stays_without_inputs():
    def forward(self, x):
        extra = self.aux(x).mean()
        return self.last(x) + (extra if x.shape[-1] > 20 else 0)

    model = head(forward)
    for inputs in (None, image()):
        plain, _ = repvgg.reparameterize(model, inputs)
        for given in (image(), image(4, 24, 25)):
            try:
                found = plain(given)
            except UsageError:
                assert inputs is not None
            else:
                assert_close(found, model(given), **EXACT)
