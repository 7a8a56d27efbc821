"""What a recording sees, what the plain model checks, and what nobody else notices."""

import copy
import io
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import repvgg
from repvgg._calls import Call
from repvgg.collapse.graph_builder import is_user_code
from repvgg.collapse.record import record
from repvgg.errors import NothingFoldedWarning, UsageError
from tests.collapse.models import Block, Branches, Linear2d, assert_same_outputs, check, conv, image, module, trained


class Modes(nn.Module):
    """An option selects what is computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x, mode="tensor"):
        y = self.conv(x)
        return y if mode == "feature" else F.relu(self.bn(y))


def test_an_option_that_selects_what_is_computed_needs_inputs():
    model = trained(Modes())
    with pytest.warns(NothingFoldedWarning, match="1 parts may fold with inputs="):
        plain, report = repvgg.reparameterize(model)
    assert_same_outputs(model, plain, image(), mode="feature")
    assert report.number_with_inputs == 1
    assert "pass inputs=" in report.left[0].reason


def test_a_call_that_differs_from_the_recorded_one_is_refused():
    model = trained(Modes())
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1
    assert "mode='tensor'" in report.guards[0].reason
    assert_same_outputs(model, plain, image(seed=5))
    for other in (plain, copy.deepcopy(plain)):
        with pytest.raises(UsageError, match=r"was collapsed for .*mode='tensor', and is called with mode='feature'"):
            other(image(), mode="feature")
    with pytest.warns(NothingFoldedWarning):
        features, report = repvgg.reparameterize(model, {"x": image(), "mode": "feature"})
    assert report.folded == ()
    assert_same_outputs(model, features, image(), mode="feature")


def test_a_flag_that_selects_what_is_computed_is_checked():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) if self.normalize else self.conv(x))

    model = module(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    model.normalize = True
    model = trained(model)
    plain, report = repvgg.reparameterize(model)
    assert report.guards[0].reason == "normalize=True"
    assert_same_outputs(model, plain, image())
    plain.normalize = False
    with pytest.raises(UsageError, match="was collapsed for normalize=True"):
        plain(image())


class Encoder(nn.Module):
    """A method calls a part of what the forward runs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = conv(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())

    def encode(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.encode(x))


def test_a_method_that_calls_a_part_keeps_its_meaning():
    model = trained(Encoder())
    with pytest.warns(NothingFoldedWarning):
        plain, report = repvgg.reparameterize(model)
    torch.testing.assert_close(plain.encode(image()), model.encode(image()), rtol=0, atol=0)
    assert "the method 'encode' of the model calls a part of it on its own" in report.left[0].reason


class Predictor(Branches):
    def predict(self, x):
        return self(x).argmax(1)


def test_class_and_methods_survive_a_new_forward_in_copies_and_files():
    model = trained(Predictor())
    plain, _ = check(model, image())
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    for other in (plain, copy.deepcopy(plain), torch.load(file, weights_only=False)):
        assert isinstance(other, Predictor)
        assert torch.equal(other.predict(image()), model.predict(image()))


@dataclass
class Detections:
    boxes: torch.Tensor
    maps: dict[str, list[torch.Tensor]]


def test_structures_of_inputs_and_outputs():
    def forward(self, images, sizes=None):
        found = [self.block(one[None]) for one in images]
        images[0] = found[0]  # writes into the list that it was given
        return Detections(torch.cat(found), {"all": found})

    model = trained(module(forward, block=Block()))
    given = [
        list(image()),
    ]
    plain, report = repvgg.reparameterize(model, given)
    assert [entry.name for entry in report.folded] == ["block.conv"]
    expected, found = model(list(image())), plain(list(image()))
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-12, atol=1e-12)
    assert len(given[0]) == 2
    assert given[0][0].shape == image()[0].shape


def test_arguments_that_all_have_defaults():
    def forward(self, pixel_values=None, labels=None, return_dict=True):
        if pixel_values is None:
            raise ValueError("pixel_values must be given")
        y = self.block(pixel_values)
        return {"logits": y} if return_dict else (y,)

    model = trained(module(forward, block=Block()))
    for inputs in (None, image(), {"pixel_values": image(), "return_dict": False}):
        plain, report = repvgg.reparameterize(model, inputs)
        assert len(report.folded) == 1
        assert_same_outputs(model, plain, **(inputs if isinstance(inputs, dict) else {"pixel_values": image()}))
    with pytest.raises(UsageError, match="pixel_values"):
        repvgg.reparameterize(model, [image()] * 4)


def test_parts_that_no_given_call_uses_are_dropped():
    def forward(self, x, auxiliary=False):
        y = self.body(x)
        return (y, self.aux(y)) if auxiliary else y

    model = trained(module(forward, body=Block(), aux=Block()))
    plain, report = repvgg.reparameterize(model, image())
    assert [entry.name for entry in report.dropped] == ["aux"]
    assert plain.aux is None
    with pytest.raises((UsageError, TypeError)):
        plain(image(), auxiliary=True)
    kept, report = repvgg.reparameterize(model)
    assert report.dropped == ()
    assert_same_outputs(model, kept, image(), auxiliary=True)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("kind", ["old weight norm", "weight norm", "spectral norm"])
def test_weights_that_are_computed_in_each_call(kind):
    utilities = {"old weight norm": nn.utils.weight_norm, "weight norm": nn.utils.parametrizations.weight_norm}
    wrap = utilities.get(kind, nn.utils.parametrizations.spectral_norm)
    model = trained(nn.Sequential(wrap(conv()), nn.ReLU(), wrap(conv())))
    assert not repvgg.is_plain(model)
    plain, report = repvgg.reparameterize(model)
    assert len(report.folded) == 2
    assert_same_outputs(model, plain, image())
    assert [type(part) for part in plain] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_scripts_and_exported_graphs_with_norms_are_not_plain():
    model = trained(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), torch.float32)
    x = image(dtype=torch.float32)
    for other in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        assert not repvgg.is_plain(other)


def test_a_recording_has_decisions_places_and_the_users_functions():
    def forward(self, x):
        y = self.scaled(x)
        return y + 1 if x.shape[-1] > 5 else y

    kind = type("Scaled", (nn.Module,), {"forward": forward, "scaled": lambda self, x: self.part(x) * 2})
    model = kind()
    model.part = conv()
    found = record(model.double(), Call((image(),)))
    assert [decision.outcome for decision in found.root.decisions] == [True]
    assert __file__ in found.root.decisions[0].where
    call = next(node for node, _ in found.calls())
    assert "forward" in call.meta["methods"]
    assert not any(isinstance(part, type(found)) for part in model.modules())


def test_threads_collapse_at_once_beside_one_that_runs_a_model():
    models = [trained(nn.Sequential(Branches(), Linear2d(), nn.ReLU())) for _ in range(4)]
    other, x = trained(Branches()), image()
    call, getter = nn.Module.__call__, nn.Module.__getattr__
    with torch.no_grad():
        expected, alone = other(x), [model(x) for model in models]
    problems, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(other(x), expected):
                    problems.append("another result")

    def collapse(place):
        for _ in range(2):
            plain, report = repvgg.reparameterize(models[place], prove=False)
            with torch.no_grad():
                error = float((plain(x) - alone[place]).abs().max())
            if error > 1e-10 or len(report.folded) != 2:
                problems.append(f"{error}, {report!r}")

    server = threading.Thread(target=serve)
    workers = [threading.Thread(target=collapse, args=(place,)) for place in range(len(models))]
    for thread in (server, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    server.join()
    assert problems == []
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getter)


class Quantized(nn.Module):
    """Rounds its weights in the forward; they lie half-way between two steps, where float64 rounds the other way."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randint(-40, 41, (8, 4, 3, 3), generator=generator).float() * 0.05)
        self.step, self.bn = nn.Parameter(torch.tensor(0.1)), nn.BatchNorm2d(8)

    def forward(self, x):
        kernel = torch.round(self.weight / self.step).clamp(-128, 127) * self.step
        return F.relu(self.bn(F.conv2d(x, kernel, padding=1)))


@pytest.mark.parametrize("prove", [True, False])
def test_constants_are_computed_in_the_dtype_of_the_model(prove):
    model = trained(Quantized(), torch.float32)
    plain, report = repvgg.reparameterize(model, prove=prove)
    assert len(report.folded) == 1
    assert_same_outputs(model, plain, image(dtype=torch.float32), tolerance=1e-5)


class OnDevice(nn.Module):
    """A kernel and a mask that are made from plain tensors, on the device of a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4, 1, 1))
        self.identity, self.mask = torch.eye(4)[:, :, None, None], torch.rand(13, 18)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        kernel = self.weight + self.identity.to(self.weight.device).type_as(self.weight)
        y = self.bn(F.conv2d(x, kernel)) + x
        return torch.maximum(y, self.mask.to(self.weight.device))


def test_tensors_that_a_forward_moves_to_the_device_of_a_parameter():
    model = trained(OnDevice())
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1
    assert repvgg.is_plain(plain, image())
    assert_same_outputs(model, plain, image())
    assert plain.to("meta")(image().to("meta")).is_meta  # the mask is no buffer: the forward moves it


def test_a_forward_with_a_device_that_no_tensor_has_is_not_rewritten():
    def forward(self, x):
        mask = torch.ones(4, 1, 1, device=torch.device("cpu"), dtype=x.dtype)
        return torch.maximum(F.relu(self.bn(self.conv(x)) * self.scale), mask)

    model = module(forward, conv=conv(), bn=nn.BatchNorm2d(4), scale=nn.Parameter(torch.rand(4, 1, 1)))
    model = trained(model)
    plain, report = repvgg.reparameterize(model, image())
    assert len(report.folded) == 1  # the norm, and not the scale
    assert hasattr(plain, "scale")
    assert_same_outputs(model, plain, image())


def test_packages_with_names_like_torch_are_code_of_a_model():
    folder = torch.__path__[0]
    assert not is_user_code(f"{folder}/nn/modules/conv.py")
    assert is_user_code(f"{folder}vision/models/densenet.py")
