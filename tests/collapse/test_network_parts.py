"""Parts of well-known networks, small: averaged heads, dense layers, auxiliary heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import repvgg
from repvgg.errors import UsageError
from tests.collapse.models import Block, assert_same_outputs, conv, image, module, trained


class NormLinear(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(4))
        self.add_module("linear", nn.Linear(4, 3))

    def fuse(self):
        return self.linear


class Heads(nn.Module):
    """The classifier of RepViT: two heads whose outputs are averaged, and a method that uses them."""

    def __init__(self):
        super().__init__()
        self.drop, self.head, self.head_dist = nn.Dropout(0.1), NormLinear(), NormLinear()

    def forward(self, x):
        x = self.drop(x)
        return (self.head(x) + self.head_dist(x)) / 2

    def fuse(self):
        return self.head.fuse()


def norms(model: nn.Module) -> int:
    return sum(isinstance(part, _BatchNorm) for part in model.modules())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


MEANS = {
    "mean": lambda x: x.mean((2, 3)),
    "pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "rows": lambda x: x.flatten(2).transpose(1, 2).mean(1),
}


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS.keys())
def test_averaged_heads_after_a_mean_are_one_linear_layer(mean):
    def forward(self, x):
        return self.forward_head(F.relu(self.conv(x)))

    def forward_head(self, x):
        return self.head(mean(x))

    model = module(forward, conv=conv(), head=Heads())
    type(model).forward_head = forward_head
    plain, report = repvgg.reparameterize(trained(model), image())
    assert [entry.multiply_adds_after for entry in report.folded] == [12]
    assert norms(plain) == 0
    assert parameters(plain) == parameters(model.conv) + 4 * 3 + 3
    assert_same_outputs(model, plain, image())
    assert_same_outputs(model, plain, image(height=9, width=7))
    features = image().relu()
    torch.testing.assert_close(plain.forward_head(features), model.forward_head(features))  # calls the whole head
    with pytest.raises(UsageError, match=r"Heads\.fuse\(\)"):
        plain.head.fuse()


def test_averaged_heads_in_the_forward_of_the_model():
    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        x, y = self.head(x), self.head_dist(x)
        return (x + y) / 2

    model = trained(module(forward, conv=conv(), head=NormLinear(), head_dist=NormLinear()))
    plain, _ = repvgg.reparameterize(model, image())
    assert norms(plain) == 0
    assert parameters(plain) == parameters(model.conv) + 4 * 3 + 3
    assert_same_outputs(model, plain, image())
    assert_same_outputs(model, plain, image(height=9, width=7))


def test_a_method_that_returns_a_module_with_the_name_of_its_merged_part_works():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = conv(), Heads()

        def forward(self, x):
            return self.head(F.relu(self.conv(x)).mean((2, 3)))

        def get_classifier(self):
            return self.head

        def get_first_head(self):
            return self.head.head

        def get_last(self, count):
            part = self
            for _ in range(count):
                part = part.head
            return part

    plain, _ = repvgg.reparameterize(trained(Network()), image())
    assert plain.get_classifier() is plain.head
    for refused in (plain.get_first_head, lambda: plain.get_last(2)):
        with pytest.raises(UsageError, match=r"'head\.head"):
            refused()


class CachedBias(nn.Module):
    """Adds a bias that depends on the number of rows, and keeps it in an attribute, as attention in LeViT does."""

    def __init__(self):
        super().__init__()
        self.bias, self.cache = nn.Parameter(torch.tensor([0.3, -1.2])), {}

    def forward(self, x):
        rows = x.shape[-2]
        if rows not in self.cache:
            self.cache[rows] = self.bias[torch.arange(rows, device=x.device) % 2][:, None]
        return F.relu(x) + self.cache[rows]


class OwnCache(CachedBias):
    def forward(self, x):
        return F.relu(x) + self.bias.sum()


def averaged_heads(x, model):
    x = x.mean((2, 3))
    return (model.head(x) + model.head_dist(x)) / 2


@pytest.mark.parametrize("called_before", [False, True])
def test_averaged_heads_are_one_linear_layer_though_another_part_keeps_what_it_computes(called_before):
    model = module(
        lambda self, x: averaged_heads(self.stage(self.conv(x)), self),
        conv=conv(),
        stage=CachedBias(),
        head=NormLinear(),
        head_dist=NormLinear(),
    )
    trained(model)
    if called_before:
        model(image())
    plain, report = repvgg.reparameterize(model, image())
    assert norms(plain) == 0
    assert parameters(plain) == parameters(model.conv) + 2 + 4 * 3 + 3
    assert report.folded[-1].multiply_adds_after == 12
    plain.stage.cache.clear()
    assert_same_outputs(model, plain, image())
    assert_same_outputs(model, plain, image(height=9, width=7))
    assert sorted(plain.stage.cache) == sorted({image().shape[-2], 9})


def stores_itself(self, x):
    self.features = x = self.stage(self.conv(x))
    return averaged_heads(x, self)


def stores_in_a_part(self, x):
    x = self.stage(self.conv(x))
    self.stage.cache[0] = x
    return averaged_heads(x, self)


@pytest.mark.parametrize("forward", [stores_itself, stores_in_a_part])
def test_a_forward_that_stores_something_stays(forward):
    parts = {"conv": conv(), "stage": OwnCache(), "head": NormLinear(), "head_dist": NormLinear()}
    model = trained(module(forward, **parts))
    plain, _ = repvgg.reparameterize(model, image())
    assert parameters(plain) == parameters(model.conv) + 2 + 2 * (4 * 3 + 3)  # each head by itself
    x = image()
    assert_same_outputs(model, plain, x)
    stored = [part.features if forward is stores_itself else part.stage.cache[0] for part in (model, plain)]
    torch.testing.assert_close(stored[1], stored[0])


@pytest.mark.slow
def test_the_two_heads_of_levit_are_one_linear_layer():
    timm = pytest.importorskip("timm")
    size, width = 64, {"embed_dim": (16, 24), "key_dim": 8, "num_heads": (2, 3), "depth": (1, 1), "num_classes": 5}
    torch.manual_seed(0)
    model = trained(timm.models.levit.LevitDistilled(img_size=size, **width))
    x = image(3, height=size, width=size)
    model(x)  # fills the caches of attention
    plain, report = repvgg.reparameterize(model, x)
    assert norms(plain) == 0
    assert [entry.convolution for entry in report.folded].count("linear 24→5") == 1
    assert sum(type(part) is nn.Linear and part.out_features == 5 for part in plain.modules()) == 1
    assert_same_outputs(model, plain, x)


class DenseLayer(nn.Module):
    """A layer of DenseNet: a method of its own concatenates, and runs the first convolution."""

    def __init__(self, inputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 8, kernel=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), conv(8, 4, bias=False)

    def bottleneck(self, features):
        return self.conv1(F.relu(self.norm1(torch.cat(features, 1))))

    def forward(self, features):
        return self.conv2(F.relu(self.norm2(self.bottleneck(features))))


class DenseBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__({f"layer{i}": DenseLayer(4 * (i + 1)) for i in range(3)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def test_norms_after_the_convolutions_of_dense_layers_fold():
    model = trained(nn.Sequential(nn.ReLU(), DenseBlock(), nn.ReLU()))
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 3
    assert [skipped.name for skipped in report.left] == [f"1.layer{i}.norm1" for i in range(3)]
    assert_same_outputs(model, plain, image())
    assert_same_outputs(model, plain, image(height=9, width=7))
    with pytest.raises(UsageError, match=r"DenseLayer\.bottleneck\(\)"):
        plain[1]["layer0"].bottleneck([image()])


def test_an_auxiliary_head_is_dropped_although_it_does_not_run_on_small_images():
    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.aux(F.avg_pool2d(x, 64))) if self.training else self.head(x)

    model = trained(module(forward, body=conv(), head=Block(), aux=Block()))
    plain, report = repvgg.reparameterize(model, image())
    assert [entry.name for entry in report.dropped] == ["aux"]
    assert plain.aux is None
    assert_same_outputs(model, plain, image())
