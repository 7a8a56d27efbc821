"""Several inputs and outputs, in containers of any kind."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from repvgg.errors import EquivalenceError, UsageError
from repvgg.verify import border_inputs, verify
from tests.verify.models import folded, net

IMAGES = border_inputs((3, 3, 12, 12), batches=2)


@dataclass
class Detections:
    boxes: Tensor
    labels: Tensor
    name: str = "detector"
    aux: Tensor | None = None


Named = namedtuple("Named", ["scores", "parts"])


class Wrapped(nn.Module):
    """A network whose outputs are packed."""

    def __init__(self, inner, pack):
        super().__init__()
        self.inner, self.pack = inner, pack

    def forward(self, x):
        return self.pack(self.inner(x))


PACKS = {
    "tuple": lambda y: (y, 100 * y[:, :2]),
    "dict": lambda y: {"logits": y, "nested": [{"sum": y.sum(1)}], "nothing": None},
    "dataclass": lambda y: Detections(1000 * y, (y > 0).long()),
    "named": lambda y: Named(y, [y[:1], y[1:]]),
    "ragged": lambda y: [row[: 1 + place] for place, row in enumerate(y)],
    "numbers": lambda y: {"loss": float(y.mean()), "count": len(y), "array": y.numpy(), "logits": y},
    "complex": lambda y: (torch.complex(y, 2 * y), y),
    "sparse": lambda y: {"a": y.relu().to_sparse(), "b": y},
}


@pytest.mark.parametrize("kind", PACKS)
def test_correct_folds_pass_and_wrong_ones_fail_in_every_container(kind):
    model = net()
    right, wrong = folded(model), folded(model)
    with torch.no_grad():
        wrong.head.bias[0] += 1e-3
    reference = Wrapped(model, PACKS[kind])
    evidence = verify(reference, Wrapped(right, PACKS[kind]), IMAGES)
    assert evidence.passed, evidence
    assert len(evidence.outputs) > 1
    assert evidence.fold_error < 1e-6
    assert evidence.relative < 4e-6
    bad = verify(reference, Wrapped(wrong, PACKS[kind]), IMAGES)
    assert not bad.passed
    assert not verify(lambda x: reference(x), Wrapped(wrong, PACKS[kind]), IMAGES).passed


def test_each_output_is_relative_to_itself_and_the_worst_is_named():
    def reference(x):
        return {"boxes": 1000 * x, "scores": x}

    def candidate(x):
        return {"boxes": 1000 * x, "scores": x + 1e-4}

    evidence = verify(reference, candidate, IMAGES)
    assert not evidence.passed, "relative to the boxes the error would be nothing"
    assert evidence.worst_output.name == "output['scores']"
    assert evidence.absolute == pytest.approx(1e-4, rel=1e-2)
    assert [one.passed for one in evidence.outputs] == [True, False]
    with pytest.raises(EquivalenceError, match=r"relative error .* of output\['scores'\] is more than the 3\.8e-06"):
        evidence.raise_if_failed()
    assert "the worst is output['scores']" in repr(evidence)


def test_integers_and_masks_must_be_the_same_and_are_counted():
    values = torch.arange(40).view(2, 20)

    def candidate(x):
        changed = values.clone()
        changed[0, :3] += 1
        return {"index": changed, "scores": x}

    evidence = verify(lambda x: {"index": values, "scores": x}, candidate, IMAGES[0])
    assert not evidence.passed
    assert evidence.reasons == ("output['index']: 3 of 40 values differ",)
    assert evidence.worst_output.mismatches == 3
    assert "differing" in repr(evidence)
    assert verify(lambda x: values, lambda x: values.clone(), IMAGES[0]).passed
    assert not verify(lambda x: x > 1, lambda x: x > 1.01, IMAGES[0], tolerance=1e3).passed


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda x: {"a": x}, "only the reference returned output['b']"),
        (lambda x: {"a": x, "b": x, "c": x}, "only the candidate returned output['c']"),
        (lambda x: {"a": x, "b": x[:1]}, "in output['b']"),
        (lambda x: {"a": x, "b": "text"}, "the candidate 'text' in output['b']"),
        (lambda x: {"a": x, "b": x / 0}, "the candidate returned a NaN or an infinity in output['b']"),
        (lambda x: {"a": x, "b": x > 0}, "float64 and the candidate bool in output['b']"),
    ],
)
def test_outputs_of_another_structure_fail_and_say_where(other, words):
    evidence = verify(Fixed(lambda x: {"a": x, "b": x}), Fixed(other), IMAGES)
    assert not evidence.passed
    assert any(words in problem for problem in evidence.problems), evidence.problems


class Fixed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_other_values_are_compared_for_equality():
    class Box:
        pass

    def outputs(mode):
        return lambda x: {"x": x, "mode": mode, "shape": x.shape, "flag": True, "other": Box()}

    assert verify(outputs("a"), outputs("a"), IMAGES).passed
    evidence = verify(outputs("a"), outputs("b"), IMAGES)
    assert evidence.problems == ("the reference returned 'a' and the candidate 'b' in output['mode']",)


def test_a_function_may_return_the_tensors_in_another_container():
    model = net().eval()

    def session(x):
        with torch.no_grad():
            y = model(x)
        return [y, 2 * y]

    assert verify(Wrapped(model, lambda y: {"a": y, "b": 2 * y}), session, IMAGES).passed
    assert not verify(Wrapped(model, lambda y: {"a": y, "b": 3 * y}), session, IMAGES).passed


@dataclass
class Boxes:
    scores: Tensor
    boxes: list[Tensor]


def test_outputs_in_another_container_are_paired_by_name():
    def reference(x):
        return Boxes(x, [2 * x, 3 * x])

    for same in (
        lambda x: {"boxes_1": 3 * x, "scores": x, "boxes_0": 2 * x},  # as of an ONNX file, in another order
        lambda x: {"boxes": (2 * x, 3 * x), "scores": x},
        lambda x: (x, 2 * x, 3 * x),
    ):
        assert verify(reference, same, IMAGES).passed
    assert not verify(reference, lambda x: {"scores": x, "boxes_0": 3 * x, "boxes_1": 2 * x}, IMAGES).passed
    assert not verify(reference, lambda x: (x, 3 * x, 2 * x), IMAGES).passed


def test_outputs_of_other_names_are_not_paired():
    evidence = verify(lambda x: {"a": x, "b": x}, lambda x: {"a": x, "c": x}, IMAGES)
    assert evidence.problems == ("only the reference returned output['b']", "only the candidate returned output['c']")
    assert verify(lambda x: {"logits": x}, lambda x: x, IMAGES).passed
    assert verify(lambda x: {"a b": x, "a-b": 2 * x}, lambda x: {"a_b": x, "a_b__1": 2 * x}, IMAGES).passed


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image, mask=None, scale=1.0):
        y = self.conv(image) * scale
        return y if mask is None else y * mask


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, left, right):
        return self.conv(left) - 2 * self.conv(right)


class ListOfImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images, targets=None):
        assert isinstance(images, (list, tuple))
        return [{"boxes": self.conv(image[None])} for image in images]


class OneDictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch):
        return {"y": self.conv(batch["image"]) + batch["shift"]}


A, B = IMAGES[0], IMAGES[0].flip(0)
BIG, SMALL = torch.randn(3, 9, 11), torch.randn(3, 8, 7)


@pytest.mark.parametrize(
    ("make", "inputs", "batches", "samples"),
    [
        (Both, (A, B), 1, 3),
        (Both, [(A, B), (B, A)], 2, 6),
        (Both, {"right": B, "left": A}, 1, 3),
        (TwoInputs, A, 1, 3),
        (TwoInputs, [A, B], 2, 6),
        (TwoInputs, [(A, torch.tensor(0.5))], 1, 3),
        (TwoInputs, {"image": A, "scale": 0.5}, 1, 3),
        (ListOfImages, [[BIG, SMALL]], 1, 2),
        (ListOfImages, ([BIG, SMALL],), 1, 2),
        (ListOfImages, {"images": [BIG, SMALL]}, 1, 2),
        (ListOfImages, [([BIG, SMALL], [{"boxes": torch.ones(1, 4)}, {"boxes": torch.ones(2, 4)}])], 1, 2),
        (OneDictionary, {"image": A, "shift": torch.ones(())}, 1, 3),
        (OneDictionary, [{"image": A, "shift": 1.0}, {"image": B, "shift": 2.0}], 2, 6),
    ],
)
def test_inputs_of_every_kind(make, inputs, batches, samples):
    torch.manual_seed(0)
    model = make()
    same, other = make(), make()
    same.load_state_dict(model.state_dict())
    evidence = verify(model, same, inputs)
    assert evidence.passed
    assert (evidence.batches, evidence.samples) == (batches, samples)
    assert not verify(model, other, inputs).passed


def test_arrays_are_taken_as_tensors():
    model = net()
    assert verify(model, folded(model), IMAGES[0].numpy()).passed
    assert verify(model, folded(model), [batch.numpy() for batch in IMAGES]).passed
    assert verify(TwoInputs(), TwoInputs(), {"image": IMAGES[0].numpy()}, tolerance=1e9).passed
    double = verify(lambda x: x, lambda x: x, np.ones((2, 3)))
    assert double.dtype == "float64"


@pytest.mark.parametrize("make", [net, lambda: TwoInputs().eval()])
def test_a_loader_of_images_and_labels(make):
    model = make()
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 12, 12), torch.arange(6)), batch_size=4)
    evidence = verify(model, model, loader)
    assert (evidence.batches, evidence.samples) == (2, 6)
    assert evidence.notes == ("the labels in the batches were not passed to the models",)
    tuples = verify(model, model, ((images, labels) for images, labels in loader))
    assert tuples.samples == 6
    as_dictionaries = verify(OneDictionary(), OneDictionary(), [{"image": A, "shift": 0.0}], tolerance=1e9)
    assert as_dictionaries.passed


def test_a_required_argument_of_integers_is_no_label():
    class Diffusion(nn.Module):
        def forward(self, x, step):
            return x * step.view(-1, 1, 1, 1)

    evidence = verify(Diffusion(), Diffusion(), [(A, torch.arange(3))])
    assert evidence.passed
    assert not any("labels" in note for note in evidence.notes)


def test_a_candidate_with_other_names_gets_the_arguments_in_order():
    model = Both().eval()
    evidence = verify(model, lambda a, b: model(a, b), {"right": B, "left": A})
    assert evidence.passed
    assert not verify(model, lambda a, b: model(b, a), {"right": B, "left": A}).passed
    with pytest.raises(UsageError, match=r"candidate does not take the inputs of the reference.*\(a\)"):
        verify(model, lambda a: a, {"right": B, "left": A})


# Made-up inputs


def test_inputs_are_made_up_from_the_first_convolution():
    model = net()
    evidence = verify(model, folded(model))
    assert evidence.passed
    assert evidence.notes == ("the inputs were made up: 2 images of 3 x 37 x 43, from 'first.0'",)
    assert evidence.batches == 2
    wrong = folded(model)
    with torch.no_grad():
        wrong.first[0].weight[0, 0, 0, 0] += 1e-2
    assert not verify(model, wrong).passed
    assert not verify(lambda x: model(x), wrong).passed, "from the candidate, where the reference is a function"


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.default_cfg = {"input_size": (1, 20, 24)}
        self.conv, self.head = nn.Conv2d(1, 2, 3, stride=2), nn.Linear(2 * 9 * 11, 3)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 2)), "2 rows of 5 numbers, from '0'"),
        (lambda: nn.Conv1d(4, 2, 3), "2 images of 4 x 43, from the model itself"),
        (lambda: nn.Sequential(nn.Conv3d(2, 2, 3)), "2 images of 2 x 6 x 37 x 43, from '0'"),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), "2 sequences of 7 tokens, from '0'"),
        (Sized, "2 images of 1 x 20 x 24, from 'conv'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Flatten(), nn.Linear(2 * 64, 1)), "2 images of 3 x 32 x 32"),
    ],
)
def test_inputs_of_other_models_are_made_up(make, text):
    model = make()
    evidence = verify(model, model)
    assert evidence.passed
    assert text in evidence.notes[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Both(), "(left, right)"),
        (nn.ReLU(), "no convolution"),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Linear(1000, 1)), "pass inputs"),
    ],
)
def test_where_no_inputs_can_be_made_up(model, words):
    with pytest.raises(UsageError) as caught:
        verify(model, model)
    assert words in str(caught.value)
    with pytest.raises(UsageError, match="pass inputs"):
        verify(lambda x: x, lambda x: x)


# Sentences


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("model.pt", "is a path, 'model.pt', not a model: read it first"),
        (nn.Conv2d, "is the class Conv2d, not a model: call it, Conv2d(…)"),
        (
            nn.Conv2d(1, 1, 1).state_dict(),
            "is a state dict, not a model: pass the model after model.load_state_dict(…)",
        ),
        (3, "must be an nn.Module or a function, got a int"),
        (None, "must be an nn.Module or a function, got a NoneType"),
    ],
)
def test_what_is_no_model_is_named(wrong, words):
    with pytest.raises(UsageError, match=r"^The reference ") as caught:
        verify(wrong, net(), IMAGES)
    assert words in str(caught.value)
    with pytest.raises(UsageError, match=r"^The candidate ") as caught:
        verify(net(), wrong, IMAGES)
    assert words in str(caught.value)


@pytest.mark.parametrize("x", [torch.ones(3, 12), torch.ones(2, 5, 12, 12), torch.ones(2, 3)])
def test_a_wrong_rank_or_shape_is_one_sentence(x):
    with pytest.raises(UsageError) as caught:
        verify(net(), net(), x)
    text = str(caught.value)
    assert text.startswith(f"The reference does not run on inputs[0]: float64 {tuple(x.shape)} (RuntimeError: ")
    assert text.endswith(": its first layer, 'first.0', takes (N, 3, height, width).")
    assert "\n" not in text


def test_a_wrong_number_of_arguments_is_one_sentence():
    with pytest.raises(UsageError, match=r"\(left, right\)"):
        verify(Both(), Both(), A)


# Two references


def test_a_reference_that_rounds_inside_is_said_to():
    class Rounding(nn.Module):
        """Rounds to a coarse grid in the arithmetic of NumPy's float16, wherever it runs."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            wide = x.dtype is torch.float64
            y = x * self.scale
            return y if wide else torch.round(y * 64) / 64

    evidence = verify(Rounding(), Rounding(), IMAGES)
    assert any("more than rounding explains" in note for note in evidence.notes)
    assert any("in float32" in note for note in evidence.notes)
    model = net()
    assert verify(model, folded(model), IMAGES).notes == ()


def test_an_error_that_rounding_explains_is_not_noted():
    class Cancelling(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.tensor(1e4))

        def forward(self, x):
            return (x + self.offset) - self.offset

    evidence = verify(Cancelling(), Cancelling(), IMAGES)
    assert evidence.reference_error > 1e-5
    assert not any("rounding explains" in note for note in evidence.notes)
