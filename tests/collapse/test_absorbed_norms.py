"""Norms after concatenations and sums, and on parts of the channels: the convolutions before them absorb them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import repvgg
from repvgg.errors import TrainingModeError
from tests.collapse.models import check, collapse, conv, image, module, trained

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def norms(model):
    return [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def two_parts(take):
    """Batch norm on four of seven channels, instance norm on the others, as IBN-Net does it."""

    def forward(self, x):
        first, second = take(self.conv(x))
        return torch.cat([torch.relu(self.bn(first)), self.other(second)], 1)

    return module(forward, conv=conv(4, 7), bn=nn.BatchNorm2d(4), other=nn.InstanceNorm2d(3))


def written(forward, channels=4, **parts):
    """Two padded convolutions of two tensors, a norm, and a last convolution whose border counts."""
    given = {"a": conv(), "b": conv(kernel=1, bias=False), "bn": nn.BatchNorm2d(channels), "last": conv(channels)}
    return module(forward, **{**given, **parts})


def check_folded(model, x=None, inputs=None):
    """Assert that every norm is folded, and that the results are the same."""
    model, x = trained(model), image() if x is None else x
    expected = model(x.clone())
    plain, report = repvgg.reparameterize(model, inputs) if inputs is not None else collapse(model)
    assert norms(model)
    assert norms(plain) == []
    assert_close(plain(x.clone()), expected, **EXACT)
    return plain, report


def check_kept(model, reason, x=None):
    """Assert that the norm stays for a reason, and that the results are the same."""
    model, x = trained(model), image() if x is None else x
    expected = model(x.clone())
    plain, report = collapse(model)
    assert len(norms(plain)) == len(norms(model))
    assert_close(plain(x.clone()), expected, **EXACT)
    (left,) = (skipped for skipped in report.left if skipped.name == "bn")
    assert reason in left.reason


# A part of the channels


@pytest.mark.parametrize(
    "take",
    [
        lambda y: y.split((4, 3), 1),
        lambda y: torch.split(y, [4, 3], dim=1),
        lambda y: (y[:, :4].contiguous(), y[:, 4:].contiguous()),
        lambda y: (y[:, 3:, ...], y[:, :3]),
        lambda y: y.chunk(2, 1),
        lambda y: (y.narrow(1, 0, 4), y.narrow(1, 4, 3)),
        lambda y: (y[:, ::2], y[:, 1::2]),
        lambda y: (y[:, :5][:, 1:], torch.cat([y[:, :1], y[:, 5:]], 1)),
    ],
)
def test_a_norm_on_a_part_of_the_channels(take):
    plain, report = check_folded(two_parts(take))
    (entry,) = report.folded
    assert entry.name == "conv"
    assert [part.name for part in entry.parts] == ["conv", "bn"]
    assert type(plain.bn) is nn.Identity


def test_a_norm_on_every_part_in_place_activations_and_a_residual():
    def forward(self, x):
        y = self.conv(x)
        a, b, c = y[:, :2], y[:, 2:6], y[:, 6:]
        return torch.cat([F.relu(self.bn(a), inplace=True), torch.sigmoid(self.more(b)), c], 1) + self.side(x)

    model = module(
        forward, conv=conv(4, 7, stride=2), bn=nn.BatchNorm2d(2), more=nn.BatchNorm2d(4), side=conv(4, 7, stride=2)
    )
    _, report = check_folded(model)
    assert [part.name for part in report.folded[0].parts] == ["conv", "bn", "more"]


@pytest.mark.parametrize("groups", [1, 4])
def test_a_merged_region_absorbs_a_norm_on_a_part(groups):
    def forward(self, x):
        a, b = self.first(self.conv(x)).chunk(2, 1)
        return self.last(torch.relu(torch.cat([self.bn(a), b * b], 1)))

    parts = {"first": nn.BatchNorm2d(8), "bn": nn.BatchNorm2d(4), "last": conv(8)}
    plain, report = check_folded(module(forward, conv=conv(4, 8, groups=groups, bias=False), **parts))
    assert plain.conv.groups == groups
    (entry,) = report.folded
    assert entry.parameters_before == plain.conv.weight.numel() + 16 + 8


def test_a_norm_that_is_written_as_a_function():
    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        a = a * self.scale.view(1, -1, 1, 1)
        a = F.batch_norm(a, self.mean, self.var, bias=self.bias)
        return torch.relu(a) + torch.tanh(b)

    model = module(forward, conv=conv(4, 8), scale=nn.Parameter(torch.rand(4) + 0.5))
    model.bias = nn.Parameter(torch.randn(4))
    model.register_buffer("mean", torch.randn(4))
    model.register_buffer("var", torch.rand(4) + 0.5)
    model = trained(model)
    plain, report = collapse(model)
    assert len(report.folded) == 1
    assert "batch_norm" not in str(type(plain).graph)
    assert list(plain.state_dict()) == ["conv.weight", "conv.bias"]
    assert_close(plain(image()), model(image()), **EXACT)


@pytest.mark.parametrize(
    ("take", "reason"),
    [
        (lambda y: (y[:, :4], y[:, 3:6]), "is read elsewhere too"),  # they overlap
        (lambda y: (y[:, :4], y), "is read elsewhere too"),
        (lambda y: (y[:, ::2], y[:, 4:]), "is read elsewhere too"),  # so do these, at channels 4 and 6
        (lambda y: (y[:, :4], torch.sigmoid(y)), "is read elsewhere too"),
        (lambda y: (y[:, :4, 1:], y[:, 4:, 1:]), "cannot be folded"),  # not all pixels
        (lambda y: (torch.relu(y)[:, :4], y[:, 4:]), "which is no convolution"),
        (lambda y: (F.pad(y, [1] * 4)[:, :4], F.pad(y, [1] * 4)[:, 4:]), "which is no convolution"),
    ],
)
def test_a_norm_stays_where_something_else_reads_its_channels(take, reason):
    model = two_parts(take)

    def forward(self, x):
        first, second = take(self.conv(x))
        return torch.relu(self.bn(first)).sum(1) + torch.sigmoid(second).sum(1)

    type(model).forward = forward
    check_kept(model, reason)


def test_a_convolution_whose_numbers_are_read_stays():
    def forward(self, x):
        y = self.conv(x)
        numbers = torch.tensor(y.flatten()[:2].tolist()) if self.flat else y.tolist()
        a, b = y.chunk(2, 1)
        return torch.relu(self.bn(a)) + b * len(numbers)

    for flat in (False, True):
        check_kept(module(forward, conv=conv(4, 8), bn=nn.BatchNorm2d(4), flat=flat), "read elsewhere too")


def test_a_part_that_is_read_before_its_norm_stays():
    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        return torch.relu(self.bn(a)) + a.sigmoid() * b

    check_kept(module(forward, conv=conv(4, 8), bn=nn.BatchNorm2d(4)), "is read elsewhere too")


def test_a_part_that_is_written_to_before_its_norm_stays():
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y[:, :4].relu_()) + torch.sigmoid(y[:, 4:])

    check_kept(module(forward, conv=conv(4, 8), bn=nn.BatchNorm2d(4)), "its memory is modified in place")


# After a concatenation or a sum


def test_a_norm_after_a_concatenation():
    def forward(self, x):
        return self.last(torch.relu(self.bn(torch.cat([self.a(torch.sin(x)), self.b(x)], 1))))

    _, report = check_folded(written(forward, 8))
    assert [entry.name for entry in report.folded] == ["a", "b"]
    assert [part.description for part in report.folded[1].parts][-1] == "BatchNorm2d of 4 of 8 channels"
    assert report.parameters_saved == 16 - 4  # the convolution without a bias gets one


def test_a_norm_after_nested_concatenations_of_parts():
    def forward(self, x):
        y, z = self.a(torch.sin(x)), self.b(x)
        first, second = y.split([1, 3], dim=1)
        merged = torch.cat([second, z], dim=1)
        nested = torch.cat([merged[:, 2:], first], dim=1)
        return self.last(torch.relu(self.bn(nested))).sum(1) + torch.sigmoid(merged[:, :2]).sum(1)

    check_folded(written(forward, 6))


def test_a_part_without_channels():
    def forward(self, x):
        y = self.conv(x)
        return torch.cat([self.bn(y[:, :8]).relu(), torch.sigmoid(y[:, 8:])], 1)

    check(trained(module(forward, conv=conv(4, 8), bn=nn.BatchNorm2d(8))), image())


def test_a_norm_after_a_sum():
    def forward(self, x):
        return self.last(torch.relu(self.bn(self.a(torch.sin(x)) + self.b(x))))

    plain, _ = check_folded(written(forward))
    assert_close(plain.b.bias, torch.zeros(4).double())  # one addend takes the offset


def test_a_norm_after_a_sum_in_place():
    def forward(self, x):
        y = self.a(torch.sin(x))
        y += self.b(x)
        return self.last(torch.relu(self.bn(y)))

    check_folded(written(forward))


def test_rows():
    def forward(self, x):
        return torch.relu(self.bn(torch.cat([self.a(x), self.b(torch.sin(x))], 1)))

    parts = {"a": nn.Linear(5, 3), "b": nn.Linear(5, 2, bias=False), "bn": nn.BatchNorm1d(5)}
    model, x = trained(module(forward, **parts)), torch.randn(6, 5).double()
    plain, report = repvgg.reparameterize(model, x)
    assert len(report.folded) == 2
    assert type(plain.bn) is nn.Identity
    assert_close(plain(x), model(x), **EXACT)


def test_batch_norms_are_folded_without_merging_branches():
    def forward(self, x):
        return self.last(torch.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1))))

    model = trained(written(forward, 8))
    plain, _ = repvgg.fold_batch_norms(model)
    assert norms(plain) == []
    assert isinstance(plain.a, nn.Conv2d)
    assert isinstance(plain.b, nn.Conv2d)
    assert_close(plain(image()), model(image()), **EXACT)
    assert repvgg.is_plain(plain)
    assert not repvgg.is_plain(model)


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        (lambda self, x: (torch.cat([self.a(x), torch.relu(x)], 1), 0), "which is no convolution"),
        (lambda self, x: (torch.cat([self.a(x.sin()), x.cos()], 1), 0), "which is no convolution"),
        (lambda self, x: (y := torch.cat([self.a(x.sin()), self.b(x)], 1), y.sigmoid()), "is read elsewhere too"),
        (lambda self, x: (torch.cat([y := self.a(x.sin()), self.b(x)], 1), y.sigmoid()), "is read elsewhere too"),
        (lambda self, x: (torch.cat([y := self.a(x), y], 1), 0), "more than once"),
        (lambda self, x: (torch.cat([self.a(x), self.a(torch.sin(x))], 1), 0), "more than once"),
        (lambda self, x: (torch.cat([self.a(x.sin()), self.b(x)], 1)[:, [0, *range(7)]], 0), "cannot be folded"),
    ],
)
def test_a_norm_after_a_concatenation_stays(merge, reason):
    def forward(self, x):
        merged, other = merge(self, x)
        return self.last(torch.relu(self.bn(merged))).sum(1) + (other if isinstance(other, int) else other.sum(1))

    check_kept(written(forward, 8), reason)


def test_a_norm_after_a_concatenation_along_rows_stays():
    def forward(self, x):
        return self.last(torch.relu(self.bn(torch.cat([self.a(torch.sin(x)), self.b(x)], 2))))

    check_kept(written(forward), "cannot be folded")


def test_a_sum_that_broadcasts_stays():
    def forward(self, x):
        return torch.relu(self.bn(self.a(torch.sin(x)) + self.b(x.mean((2, 3), keepdim=True))))

    check_kept(written(forward), "cannot be folded")


def test_a_norm_after_a_padding_of_a_convolution_stays():
    def forward(self, x):
        return self.last(
            torch.relu(self.bn(torch.cat([F.pad(self.a(torch.sin(x)), [1] * 4), F.pad(self.b(x), [1] * 4)], 1)))
        )

    check_kept(written(forward, 8), "in front of it")


def test_modules_with_hooks_and_modules_that_are_used_twice_stay():
    def forward(self, x):
        return self.last(torch.relu(self.bn(torch.cat([self.a(torch.sin(x)), self.b(x)], 1))))

    hooked = written(forward, 8)
    hooked.b.register_forward_hook(lambda *_: None)
    check_kept(hooked, "has hooks")

    def twice(self, x):
        y = torch.cat([self.a(torch.sin(x)), self.b(x)], 1)
        return self.last(torch.relu(self.bn(y))) + self.b(x.cos())

    check_kept(written(twice, 8, last=conv(8)), "more than once")


def test_a_convolution_whose_result_is_kept_stays():
    def forward(self, x):
        self.kept = self.b(x)
        return self.last(torch.relu(self.bn(torch.cat([self.a(torch.sin(x)), self.kept], 1))))

    check_kept(written(forward, 8), "stored in an attribute")


def test_another_branch_of_the_forward_that_reads_the_channels_is_respected():
    def forward(self, x, raw=False):
        a, b = self.conv(x).chunk(2, 1)
        return torch.cat([torch.relu(a if raw else self.bn(a)), b], 1)

    model = trained(module(forward, conv=conv(4, 8), bn=nn.BatchNorm2d(4)))
    x = image()
    with pytest.warns(repvgg.errors.NothingFoldedWarning):
        plain, report = repvgg.reparameterize(model)
    assert "takes optional arguments" in report.left[0].reason
    assert_close(plain(x, raw=True), model(x, raw=True), **EXACT)
    plain, report = repvgg.reparameterize(model, x)
    assert norms(plain) == []
    assert_close(plain(x), model(x), **EXACT)
    with pytest.raises(repvgg.errors.UsageError):
        plain(x, raw=True)


def test_another_branch_that_concatenates_the_same_without_the_norm_is_respected():
    def forward(self, x, raw=False):
        y = torch.cat([self.a(torch.sin(x)), self.b(x)], 1)
        return torch.relu(y if raw else self.bn(y))

    model = trained(written(forward, 8))
    with pytest.warns(repvgg.errors.NothingFoldedWarning):
        plain, _ = repvgg.reparameterize(model)
    assert_close(plain(image(), raw=True), model(image(), raw=True), **EXACT)


def test_a_norm_in_training_mode_is_refused():
    model = trained(two_parts(lambda y: y.split((4, 3), 1)))
    model.bn.train()
    with pytest.raises(TrainingModeError, match="'bn'"):
        repvgg.reparameterize(model)


def test_a_norm_with_batch_statistics_stays():
    model = two_parts(lambda y: y.split((4, 3), 1))
    model.bn = nn.BatchNorm2d(4, track_running_stats=False)
    plain, _ = collapse(trained(model))
    assert_close(plain(image()), model(image()), **EXACT)
    assert len(norms(plain)) == 1


def test_in_float32_the_proof_holds_and_the_report_says_how_well():
    def forward(self, x):
        return self.last(torch.relu(self.bn(torch.cat([self.a(torch.sin(x)), self.b(x)], 1))))

    model = trained(written(forward, 8), torch.float32)
    plain, report = repvgg.reparameterize(model)
    assert all("relative error" in entry.proof for entry in report.folded)
    assert_close(plain(image(dtype=torch.float32)), model(image(dtype=torch.float32)), rtol=1e-5, atol=1e-5)
