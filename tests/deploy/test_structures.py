"""Exports of models with several inputs and outputs, in containers of any kind."""

import json
from dataclasses import dataclass

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from repvgg._calls import Call
from repvgg.deploy import OnnxRunner, ProgramRunner, export_onnx, export_program, images_for, ship
from repvgg.deploy.flat import FlatModule
from repvgg.errors import EquivalenceError, ExportError, UsageError


@dataclass
class Output:
    scores: Tensor
    boxes: list[Tensor]
    name: str = "detector"


class Head(nn.Module):
    def __init__(self, pack=lambda y: Output(y, [y[:, :1], 2 * y])):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pack = nn.Conv2d(3, 4, 3), pack

    def forward(self, x):
        return self.pack(self.conv(x).relu().mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image, mask=None, scale=1.0, extra=None):
        y = self.conv(image) * scale
        y = y if mask is None else y * mask
        return {"y": y if extra is None else y + extra["shift"], "pooled": y.mean((2, 3))}


X = torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(0))
MASK = (X[:, :1] > 0).float()


def test_outputs_are_named_after_the_expressions_that_read_them():
    assert FlatModule(Head(), Call((X,))).outputs == ["scores", "boxes_0", "boxes_1"]
    assert FlatModule(Head(lambda y: (y, {"a": y})), Call((X,))).outputs == ["0", "1_a"]
    assert FlatModule(Head(lambda y: {"a b": y, "a-b": 2 * y}), Call((X,))).outputs == ["a_b", "a_b__1"]
    one = FlatModule(Head(lambda y: y), Call((X,)))
    assert (one.inputs, one.outputs, one.is_plain) == (["image"], ["logits"], True)
    two = FlatModule(TwoInputs(), Call((X,), {"extra": {"shift": MASK}, "mask": MASK}))
    assert two.inputs == ["image", "extra_shift", "mask"]


@pytest.mark.parametrize("dynamic", [True, False])
def test_onnx_with_several_outputs(tmp_path, dynamic):
    model = Head().eval()
    export_onnx(model, tmp_path / "a.onnx", (3, 9, 8), dynamic_batch=dynamic)
    runner = OnnxRunner(tmp_path / "a.onnx")
    assert runner.outputs == ("scores", "boxes_0", "boxes_1")
    x = X if dynamic else X[:1]
    found, expected = runner(x), model(x)
    assert_close(found["scores"], expected.scores.detach())
    assert_close([found["boxes_0"], found["boxes_1"]], [box.detach() for box in expected.boxes])


@pytest.mark.parametrize(
    "inputs",
    [[X, MASK], {"image": X, "mask": MASK, "scale": 2.0}, {"mask": MASK, "image": X, "extra": {"shift": MASK}}],
)
def test_onnx_and_programs_with_several_inputs(tmp_path, inputs):
    model = TwoInputs().eval()
    export_onnx(model, tmp_path / "a.onnx", inputs=inputs)
    export_program(model, tmp_path / "a.pt2", inputs=inputs)
    runner = OnnxRunner(tmp_path / "a.onnx")
    by_name = {name: X if name == "image" else MASK for name in runner.inputs}
    two = {name: value[:2] for name, value in by_name.items()}
    for tensors in (by_name, two):
        call = {
            name: tensors["image"] if name == "image" else tensors[name] for name in tensors if name != "extra_shift"
        }
        rest = {} if isinstance(inputs, list) else {name: inputs[name] for name in ("scale",) if name in inputs}
        if "extra_shift" in tensors:
            rest["extra"] = {"shift": tensors["extra_shift"]}
        expected = model(**call, **rest)
        found = runner(**tensors)
        for name in ("y", "pooled"):
            assert_close(found[name], expected[name].detach())
        program = ProgramRunner(tmp_path / "a.pt2")(*tensors.values())
        assert_close(program, {name: value.detach() for name, value in expected.items()})


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize(
    "pack", [None, lambda y: {"logits": y, "nested": [(y,)], "none": None, "text": "a"}, lambda y: [y]]
)
def test_files_are_verified_whatever_the_structure(tmp_path, suffix, pack):
    model = Head(pack) if pack else Head()
    shipped = ship(model.eval(), Head(model.pack).eval(), tmp_path / f"a{suffix}", (3, 9, 8))
    assert shipped.dynamic_batch
    assert shipped.evidence.passed
    other = Head(model.pack).eval()
    with torch.no_grad():
        other.conv.weight *= 1.001
    with pytest.raises(EquivalenceError):
        ship(model, other, tmp_path / f"b{suffix}", (3, 9, 8))
    assert not (tmp_path / f"b{suffix}").exists()


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_several_inputs_are_shipped(tmp_path, suffix):
    model = TwoInputs().eval()
    path = tmp_path / f"a{suffix}"
    shipped = ship(model, TwoInputs().eval(), path, (3, 9, 8), inputs={"image": X, "mask": MASK, "scale": 2.0})
    assert shipped.dynamic_batch
    assert shipped.evidence.passed
    assert len(shipped.evidence.outputs) == 2
    json.dumps(shipped.evidence.to_dict(), allow_nan=False)


def test_programs_keep_the_structure_of_outputs(tmp_path):
    def pack(y):
        return {"one": y, "more": [2 * y, (Output(3 * y, []), None, 7, "text", object())], "size": y.shape[1:]}

    model = Head(pack).eval()
    export_program(model, tmp_path / "a.pt2", (3, 9, 8))
    y, found = model(X)["one"].detach(), ProgramRunner(tmp_path / "a.pt2")(X)
    inside = {"scores": 3 * y, "boxes": [], "name": None}
    assert_close(found["more"][1][0].pop("scores"), inside.pop("scores"))
    assert_close([found.pop("one"), found["more"].pop(0)], [y, 2 * y])
    assert found == {"more": [(inside, None, 7, None, None)], "size": (4,)}
    tuples = Head(lambda y: (y, [y])).eval()
    export_program(tuples, tmp_path / "b.pt2", (3, 9, 8))
    assert_close(ProgramRunner(tmp_path / "b.pt2")(X), (y, [y]))


def test_images_are_found_for_outputs_of_any_structure():
    assert images_for(Head(), (3, 9, 8))[0].shape[1:] == (3, 9, 8)
    with pytest.raises(UsageError, match="no floating-point numbers to compare"):
        images_for(Head(lambda y: {"index": y.argmax(1)}), (3, 9, 8))


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(ExportError, match="returns None: only models that return tensors"):
        export_onnx(Head(lambda y: None), tmp_path / "a.onnx", (3, 9, 8))
    with pytest.raises(ExportError, match=r"cannot be exported for inputs\[0\]: float32 \(2, 4, 9, 8\): RuntimeError"):
        export_program(Head(), tmp_path / "a.pt2", (4, 9, 8))
    with pytest.raises(UsageError, match=r"\(image, mask=None, scale=1.0, extra=None\)"):
        export_onnx(TwoInputs(), tmp_path / "a.onnx", inputs=[X] * 5)
    for wrong in ({}, {"input_shape": (3, 9, 8), "inputs": X}):
        with pytest.raises(UsageError, match="the shape of an image"):
            export_onnx(Head(), tmp_path / "a.onnx", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_weights_keep_their_names(tmp_path):
    export_onnx(Head(lambda y: y).eval(), tmp_path / "a.onnx", (3, 9, 8))
    names = [value.name for value in onnx.load(tmp_path / "a.onnx").graph.initializer]
    assert "conv.weight" in names
