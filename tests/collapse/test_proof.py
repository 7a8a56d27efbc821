"""Proofs of regions and models: what they accept, what they refuse, what they cost."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repvgg._calls import Call
from repvgg.collapse.proof import prove_module, prove_region
from repvgg.verify import border_inputs

IMAGE = border_inputs((1, 6, 7, 8), batches=1, dtype=torch.float64)[0]
CONVOLUTIONS = {
    "conv": lambda: nn.Conv2d(6, 5, 3, padding=1),
    "grouped": lambda: nn.Conv2d(6, 4, (1, 3), stride=2, groups=2, padding_mode="circular", padding=(0, 1)),
    "same": lambda: nn.Conv2d(6, 4, 4, padding="same", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2),
    "linear": lambda: nn.Linear(8, 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # by PyTorch, as in any forward of such a layer
def test_rounding_each_weight_is_accepted_and_more_is_not(kind, dtype):
    torch.manual_seed(0)
    exact = CONVOLUTIONS[kind]().double()
    rounded = copy.deepcopy(exact).to(dtype)
    before = {name: value.clone() for name, value in rounded.state_dict().items()}
    proof = prove_region(exact, IMAGE, rounded)
    assert proof.failure is None
    assert proof.ran
    assert proof.text.startswith("relative error ")
    assert "float64" in proof.text
    for name, value in rounded.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert value.dtype is dtype
    wrong = copy.deepcopy(exact)
    with torch.no_grad():
        # One weight in many: 40 roundings of all are within the bound, this is more than each weight's share.
        step = {torch.float64: 1e-9}.get(dtype, 300 * torch.finfo(dtype).eps)
        wrong.weight.view(-1)[3] += step * wrong.weight.abs().max() + step
    assert prove_region(exact, IMAGE, wrong.to(dtype)).failure


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_convolution_that_is_not_finite_is_refused(value):
    good = nn.Conv2d(6, 5, 3)
    bad = copy.deepcopy(good)
    with torch.no_grad():
        bad.weight[0, 0, 0, 0] = value
    assert prove_region(lambda x: copy.deepcopy(good).double()(x), IMAGE, bad).failure
    assert prove_region(lambda x: copy.deepcopy(bad).double()(x), IMAGE, good).failure


def test_another_shape_is_refused_and_a_region_that_does_not_run_is_told():
    good = nn.Conv2d(6, 5, 3)
    assert "shape" in prove_region(lambda x: good.double()(x)[..., 1:], IMAGE, copy.deepcopy(good)).failure
    proof = prove_region(lambda x: 1 / 0, IMAGE, good)
    assert not proof.ran
    assert "ZeroDivisionError" in proof.failure


class Packed(nn.Module):
    """Several inputs, and outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image, mask=None, scale=1.0):
        y = self.conv(image) * scale
        index = y.flatten(1).argmax(1)
        return {"y": y if mask is None else y * mask, "small": [1e-3 * y], "index": index, "note": None}


X = border_inputs((2, 3, 9, 8), batches=1)[0]


@pytest.mark.parametrize("inputs", [X, [X, 0.5 * X[:, :1]], {"image": X, "scale": 2.0}, Call((X,), {"scale": 3.0})])
def test_a_whole_model_is_compared_on_inputs_and_outputs_of_any_structure(inputs):
    model = Packed().eval()
    same = copy.deepcopy(model)
    proof = prove_module(model, same, inputs)
    assert proof.ran
    assert proof.failure is None
    assert proof.text.endswith("on the given inputs")
    with torch.no_grad():
        same.conv.weight[0] *= 1 + 1e-4
    wrong = prove_module(model, same, inputs)
    assert wrong.failure
    assert "output[" in wrong.failure


def test_an_error_in_a_small_output_is_not_hidden_by_a_large_one():
    class Wrong(Packed):
        def forward(self, image, mask=None, scale=1.0):
            found = super().forward(image, mask, scale)
            return {**found, "small": [found["small"][0] + 1e-7]}

    model = Packed().eval()
    wrong = Wrong().eval()
    wrong.load_state_dict(model.state_dict())
    assert "output['small'][0]" in prove_module(model, wrong, X).failure


def test_a_class_index_that_differs_is_refused():
    class Wrong(Packed):
        def forward(self, image, mask=None, scale=1.0):
            return {**(found := super().forward(image, mask, scale)), "index": found["index"] + 1}

    model = Packed().eval()
    wrong = Wrong().eval()
    wrong.load_state_dict(model.state_dict())
    assert "output['index']" in prove_module(model, wrong, X).failure


def test_equal_infinities_are_equal():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y.masked_fill(y < 0, float("-inf"))

    model = Masked().eval()
    assert prove_module(model, copy.deepcopy(model), X).failure is None
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.conv.bias += 0.5
    assert prove_module(model, shifted, X).failure


@pytest.mark.parametrize("name", ["list", "dictionary"])
def test_detectors(name):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images, targets=None):
            return [{"boxes": self.conv(image[None]), "size": tuple(image.shape)} for image in images]

    images = [torch.randn(3, 9, 8), torch.randn(3, 7, 11)]
    model = Detector().eval()
    inputs = [images] if name == "list" else {"images": images}
    assert prove_module(model, copy.deepcopy(model), inputs).failure is None
    assert prove_module(model, Detector().eval(), inputs).failure


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.conv2d(self.conv(x), torch.ones(4, 1, 3, 3) / 9, groups=4) + torch.arange(4.0).view(4, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constants_of_the_default_dtype(dtype):
    model = Constant().to(dtype).eval()
    proof = prove_module(model, copy.deepcopy(model), X.to(dtype))
    assert proof.ran
    assert proof.failure is None


def test_what_a_forward_stores_and_what_hooks_see_is_untouched():
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls += 1
            self.last = x
            return self.conv(x)

    seen = []
    old, new = Storing().eval(), Storing().eval()
    new.load_state_dict(old.state_dict())
    old.conv.register_forward_hook(lambda *_: seen.append(1))
    old.train()
    old.conv.eval()
    assert prove_module(old, new, X).failure is None
    assert seen == []
    assert old.training
    for model in (old, new):
        assert float(model.calls) == 0.0
        assert model.last is None


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
def test_hooks_that_compute_weights_run():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))).eval()
    with torch.no_grad():
        model[0].weight_g.mul_(2.0)  # the weight is not computed anew before the next forward
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with torch.no_grad():
        v_OIHW = model[0].weight_v
        plain[0].weight.copy_(model[0].weight_g * v_OIHW / v_OIHW.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        plain[0].bias.copy_(model[0].bias)
    assert prove_module(model, plain, X).failure is None


def test_another_thread_may_run_the_model_meanwhile():
    model = Packed().eval()
    with torch.no_grad():
        expected = model(X)["y"]
    outcomes = []

    def serve():
        while not done.is_set():
            with torch.no_grad():
                outcomes.append(torch.equal(model(X)["y"], expected) and not model.conv.training)

    done = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        proofs = [prove_module(model, copy.deepcopy(model), X) for _ in range(10)]
    finally:
        done.set()
        thread.join()
    assert all(proof.ran and proof.failure is None for proof in proofs)
    assert outcomes
    assert all(outcomes)


class Masked(nn.Module):
    """The sum of a convolution, where a mask is set, and of an empty cache."""

    def __init__(self, keep):
        super().__init__()
        self.conv, self.keep = nn.Conv2d(3, 3, 3, padding=1), keep

    def forward(self, x, mask, cache):
        chosen = mask if self.keep else ~mask
        return torch.where(chosen, self.conv(x), 0) + cache.sum()


def test_masks_and_empty_tensors_without_values_are_made_up():
    old = Masked(keep=True).eval()
    shapes = ((1, 3, 37, 43), torch.float32), ((1, 1, 37, 43), torch.bool), ((1, 8, 0, 64), torch.float32)
    call = Call(tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes))
    equal = prove_module(old, copy.deepcopy(old), call)
    assert equal.ran
    assert equal.failure is None
    other = copy.deepcopy(old)
    other.keep = False
    assert prove_module(old, other, call).failure
