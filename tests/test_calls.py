from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg._calls import Call, bind
from repvgg.errors import UsageError

A, B = torch.ones(3, 4, 5), torch.zeros(3, 6, 7)


class One(nn.Module):
    def forward(self, x):
        return x


class Pair(nn.Module):
    def forward(self, x, mask):
        return x


class HuggingFace(nn.Module):
    def forward(self, pixel_values=None, mask=None, labels=None):
        return pixel_values


class Detector(nn.Module):
    def forward(self, images, targets=None):
        return images


class Free(nn.Module):
    def forward(self, *args, **kwargs):
        return args


class KeywordOnly(nn.Module):
    def forward(self, x, *, scale):
        return x


class WithExtras(nn.Module):
    def forward(self, x, **kwargs):
        return x


class ByNameAlone(nn.Module):
    def forward(self, **batch):
        return batch


@dataclass
class Batch:
    image: torch.Tensor


def shown(call):
    return len(call.args), sorted(call.kwargs)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (One(), A, (1, [])),
        (One(), [A], (1, [])),
        (One(), (A,), (1, [])),
        (One(), [[A, B]], (1, [])),
        (One(), ([A, B],), (1, [])),
        (One(), {"x": A}, (0, ["x"])),
        (One(), {"image": A}, (1, [])),
        (One(), [{"x": A}], (1, [])),
        (One(), Batch(A), (1, [])),
        (Pair(), [A, B], (2, [])),
        (Pair(), (A, None), (2, [])),
        (Pair(), {"mask": B, "x": A}, (0, ["mask", "x"])),
        (HuggingFace(), A, (1, [])),
        (HuggingFace(), [A, B], (2, [])),
        (HuggingFace(), {"pixel_values": A, "labels": B}, (0, ["labels", "pixel_values"])),
        (Detector(), [[A, B]], (1, [])),
        (Detector(), {"images": [A, B]}, (0, ["images"])),
        (Detector(), {"image": A, "size": 4}, (1, [])),
        (Free(), [A, B, A], (3, [])),
        (Free(), {"a": A}, (1, [])),
        (KeywordOnly(), {"x": A, "scale": 2.0}, (0, ["scale", "x"])),
        (WithExtras(), {"image": A}, (1, [])),
        (WithExtras(), {"x": A, "mode": "feat"}, (0, ["mode", "x"])),
        (ByNameAlone(), {"image": A}, (0, ["image"])),
        (lambda x: x, A, (1, [])),
        (torch.relu, A, (1, [])),
        (nn.Sequential(nn.ReLU()), A, (1, [])),
        (nn.DataParallel(One()), {"image": A}, (1, [])),
        (torch.compile(One(), backend="eager"), {"image": A}, (1, [])),  # the default one takes seconds to import
    ],
)
def test_inputs_bind_as_the_forward_takes_them(model, inputs, expected):
    assert shown(bind(model, inputs)) == expected


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (One(), [A, B], ["(x)", "2 given", "a list of its own"]),
        (HuggingFace(), [A, A, A, A], ["(pixel_values=None, mask=None, labels=None)", "4 given"]),
        (HuggingFace(), {"pixel_value": A}, ["has no 'pixel_value'", "did you mean pixel_values"]),
        (HuggingFace(), {"picture": A}, ["pixel_values=None", "no 'picture'"]),
        (Pair(), A, ["(x, mask)", "'mask'", "1 given"]),
        (Pair(), {"x": A}, ["'mask' is missing"]),
        (KeywordOnly(), A, ["'scale'", "by name in a dictionary"]),
        (One(), "image.png", ["tensor", "str"]),
        (One(), [], ["an empty list"]),
        (One(), {}, ["an empty dict"]),
        (One(), None, ["None"]),
        (One(), [3], ["[3]"]),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence_that_names_the_parameters(model, inputs, words):
    with pytest.raises(UsageError) as caught:
        bind(model, inputs)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400


def test_arrays_become_tensors_wherever_they_are():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    call = bind(Detector(), [[x, x[:, ::-1]], {"mask": np.broadcast_to(x, (2, 2, 3))}])
    first, flipped, mask = call.tensors()
    assert_close(first, torch.from_numpy(x), rtol=0, atol=0)
    assert_close(flipped, first.flip(1), rtol=0, atol=0)
    assert_close(mask, first.expand(2, 2, 3), rtol=0, atol=0)
    with pytest.raises(UsageError, match="object"):
        bind(One(), np.array([object()]))


def test_a_call_runs_maps_and_prints():
    call = bind(Pair(), {"x": A, "mask": [B, None]})
    assert call(lambda x, mask: (x, mask))[1][0] is B
    doubled = call.map_tensors(lambda x: 2 * x)
    assert_close(doubled.kwargs["x"], 2 * A, rtol=0, atol=0)
    assert doubled.kwargs["mask"][1] is None
    assert_close(call.kwargs["x"], torch.ones(3, 4, 5), rtol=0, atol=0)
    assert repr(call) == "x: float32 (3, 4, 5), mask[0]: float32 (3, 6, 7), mask[1]: None"
    assert repr(Call((A, "feat"))) == "inputs[0]: float32 (3, 4, 5), inputs[1]: 'feat'"
    assert bind(One(), call) is call


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_scripts_and_exported_modules_take_what_they_took_before():
    scripted = torch.jit.script(nn.ReLU())
    assert shown(bind(scripted, A)) == (1, [])
    exported = torch.export.export(nn.ReLU(), (A,)).module()
    assert shown(bind(exported, A)) == (1, [])


def test_a_default_that_is_a_tensor_is_named_by_its_shape():
    class WithTensor(nn.Module):
        def forward(self, x, scale=torch.ones(100, 100)):  # noqa: B008
            return x

    with pytest.raises(UsageError, match=r"scale=float32 \(100, 100\)"):
        bind(WithTensor(), [A, A, A])
