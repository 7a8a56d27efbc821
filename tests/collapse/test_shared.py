"""Modules that are called twice, shared, tied, or accessed past their owner are not folded into one caller."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.collapse.models import Block, Branches, Linear2d, check, conv, image, module, trained


def blocked(block, forward):
    return module(forward, block=block)


def called_twice():
    return module(lambda self, x: self.bn(self.conv(F.relu(self.bn(self.conv(x))))), conv=conv(), bn=nn.BatchNorm2d(4))


def conv_called_twice():
    return module(lambda self, x: self.bn(self.conv(x)) + F.relu(self.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4))


def weight_read():
    def forward(self, x):
        return self.bn(self.conv(x)) + F.relu(F.conv2d(F.relu(x), self.conv.weight, padding=1))

    return module(forward, conv=conv(), bn=nn.BatchNorm2d(4))


def weight_computed_with():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * self.conv.weight.abs().mean()

    return module(forward, conv=conv(), bn=nn.BatchNorm2d(4))


def past_the_owner():
    return blocked(Block(), lambda self, x: self.block(self.block.conv(x)))


def only_past_the_owner():
    return blocked(Block(), lambda self, x: F.relu(self.block.conv(x)))


def called_from_the_root():
    inner = blocked(Block(), lambda self, x: self.block(x))
    return module(lambda self, x: self.inner(x) + F.relu(self.inner.block.conv(x)), inner=inner)


def by_a_sibling():
    block = Block()
    reaching = module(lambda self, x: F.relu(self.held.conv(x)), held=block)
    return module(lambda self, x: self.p(x) + self.q(x), p=nn.Sequential(block), q=reaching)


def held_in_a_list_of_another_module():
    block = Block()
    reaching = module(lambda self, x: F.relu(self.held[0].conv(x)))
    reaching.held = [block]
    return module(lambda self, x: self.p(x) + self.q(x), p=block, q=reaching)


def sequence_and_its_first():
    parts = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    return module(lambda self, x: self.parts(x) + F.relu(self.parts[0](x)), parts=parts)


def every_output_of_a_sequence():
    def forward(self, x):
        outcomes = []
        for part in self.parts:
            x = part(x)
            outcomes.append(x)
        return outcomes

    return module(forward, parts=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()))


def shared_norm():
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(conv(), norm, nn.ReLU(), conv(), norm)


def tied_and_read():
    def forward(self, x):
        y = self.bn2(self.c2(F.relu(self.bn1(self.c1(x)))))
        return F.relu(y) + F.conv2d(F.relu(x), self.c2.weight).mean()

    model = module(forward, c1=conv(), bn1=nn.BatchNorm2d(4), c2=conv(), bn2=nn.BatchNorm2d(4))
    model.c2.weight = model.c1.weight
    return model


def untraced(forward):
    def decides(self, x):
        return x if x.sum() > 1e9 else forward(self, x)

    return decides


def past_the_owner_untraced():
    def forward(self, x):
        y = self.block(x)
        return F.relu(self.block.conv(y)) if x.sum() < 1e9 else y

    return blocked(Block(), forward)


def weight_read_untraced():
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return F.relu(F.conv2d(self.block(x), self.block.conv.weight, padding=1))

    return blocked(Block(), forward)


def children_iterated_untraced():
    def forward(self, x):
        y = self.block(x)
        if x.sum() > 1e9:
            return y
        for part in self.block.children():
            y = F.relu(part(y))
        return y

    return blocked(Block(), forward)


def sequence_indexed_untraced():
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        for part in self.parts:
            x = part(x)
        return F.relu(self.parts[0](x))

    return module(forward, parts=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()))


NEVER = [
    called_twice,
    conv_called_twice,
    weight_read,
    weight_computed_with,
    past_the_owner,
    only_past_the_owner,
    called_from_the_root,
    by_a_sibling,
    held_in_a_list_of_another_module,
    sequence_and_its_first,
    every_output_of_a_sequence,
    shared_norm,
    tied_and_read,
    past_the_owner_untraced,
    weight_read_untraced,
    children_iterated_untraced,
    sequence_indexed_untraced,
]


@pytest.mark.parametrize("make", NEVER, ids=lambda f: f.__name__)
def test_shared_module_stays_with_a_reason(make):
    _, report = check(trained(make()), image())
    assert report.folded == ()
    assert report.left


def block_with_two_parents():
    block = Linear2d()
    return module(
        lambda self, x: self.p(x) + self.q(F.relu(x)), p=nn.Sequential(block, nn.ReLU()), q=nn.Sequential(block)
    )


def conv_with_two_parents():
    shared = conv()
    p, q = (nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(2))
    return module(lambda self, x: F.relu(self.p(x)) + self.q(F.relu(x)), p=p, q=q)


def two_names():
    model = module(lambda self, x: F.relu(self.a(x)) + self.b(F.relu(x)), a=Linear2d())
    model.b = model.a
    return model


def tied_weights():
    def forward(self, x):
        return self.bn2(self.c2(F.relu(self.bn1(self.c1(x)))))

    model = module(forward, c1=conv(), bn1=nn.BatchNorm2d(4), c2=conv(), bn2=nn.BatchNorm2d(4))
    model.c2.weight = model.c1.weight
    return model


def indexed_sequence():
    parts = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    return module(lambda self, x: self.parts[2](self.parts[1](self.parts[0](x))), parts=parts)


def own_list():
    model = module(lambda self, x: F.relu(self.layers[1](self.layers[0](x))), conv=conv(), bn=nn.BatchNorm2d(4))
    model.layers = [model.conv, model.bn]
    return model


def child_that_knows_its_parent():
    model = module(lambda self, x: self.b(self.a(x)), a=Branches(), b=Linear2d())
    model.a.__dict__["parent"] = model
    return model


def owner_read_untraced():
    def forward(self, x):
        return x if x.sum() > 1e9 else self.b(self.a(x))

    return module(forward, a=Branches(), b=Block())


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (block_with_two_parents, 1),
        (conv_with_two_parents, 2),
        (two_names, 1),
        (tied_weights, 2),
        (indexed_sequence, 1),
        (own_list, 1),
        (child_that_knows_its_parent, 2),
        (owner_read_untraced, 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_unaffected_modules_are_folded(make, folded):
    plain, report = check(trained(make()), image())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    assert len(report.folded) >= folded


def test_shared_block_stays_shared():
    plain, _ = check(trained(two_names()), image())
    assert plain.a is plain.b


@pytest.mark.parametrize("reads", ["stride", "class", "part"])
def test_block_whose_type_the_code_reads_is_kept(reads):
    def forward(self, x):
        y = self.block(x)
        if reads == "stride":
            special = self.block.stride == 1
        elif reads == "class":
            special = isinstance(self.block, Linear2d)
        else:
            special = self.block.bn.eps > 0
        return F.relu(y) + x if special else F.relu(y)

    model = trained(module(forward, block=Linear2d(), other=Block()))
    _, report = check(model, image())
    reasons = {entry.name: entry.reason for entry in report.left}
    assert "depends on the class or attributes of its parts" in reasons["block.bn"]


def test_plain_attributes_that_a_parent_reads_are_kept():
    model = trained(module(lambda self, x: F.relu(self.block(x)) * self.block.tag, block=Linear2d()))
    plain, _ = check(model, image())
    assert isinstance(plain.block, nn.Conv2d)
    assert plain.block.tag == 3


def test_attributes_of_a_block_with_a_new_forward_are_kept():
    model = trained(nn.Sequential(Branches()))
    plain, _ = check(model, image())
    assert plain[0].width == 4
    assert {"0.temperature", "0.count", "0.unused.weight"} <= plain.state_dict().keys()
    assert torch.equal(plain[0].unused.weight, model[0].unused.weight)


def test_a_dropout_that_a_forward_calls_twice_parts_nothing():
    def forward(self, x):
        x = self.drop(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.drop(self.bn2(self.conv2(x))) * 2)

    parts = {"conv1": conv(), "bn1": nn.BatchNorm2d(4), "conv2": conv(), "bn2": nn.BatchNorm2d(4)}
    plain, report = check(trained(module(forward, drop=nn.Dropout(0.1), **parts)), image())
    assert not report.left
    assert not any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
