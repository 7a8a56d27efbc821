"""Damaged, forged and malicious files are refused in one sentence, and no code in them runs."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.testing import assert_close

from repvgg import create_model, load
from repvgg.checkpoints import read_checkpoint, save_torch
from repvgg.errors import CheckpointError, OutputError, OutputExistsError
from repvgg.models import ModelSpec, Stage, describe_model, save

SPEC = ModelSpec("tiny", Stage(1, 4), (Stage(2, 4), Stage(1, 8)))
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The bytes of one model as safetensors, as a torch file and as a torch file in the old format."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    model = create_model(SPEC, 3)
    save(folder / "safetensors", model, describe_model(model, "train"))
    save(folder / "torch.pth", model, describe_model(model, "train"), layout="timm")
    torch.save(model.state_dict(), folder / "legacy", _use_new_zipfile_serialization=False)
    files = {path.name.partition(".")[0]: path.read_bytes() for path in sorted(folder.iterdir())}
    assert set(files) == {"safetensors", "torch", "legacy"}
    return files


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS = ["safetensors", "torch", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_intact_files_are_read(tmp_path, originals, kind):
    (tmp_path / "intact").write_bytes(originals[kind])
    assert load(tmp_path / "intact").metadata.form == "train"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@FUZZ
def test_truncated_files(tmp_path, originals, kind, data):
    content = originals[kind]
    path = tmp_path / "cut"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refused(path)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@FUZZ
def test_flipped_bits(tmp_path, originals, kind, data):
    """A file with one flipped bit is refused or gives a model; of safetensors, only the header is flipped."""
    content = bytearray(originals[kind])
    end = 8 + int.from_bytes(content[:8], "little") if kind == "safetensors" else len(content)
    content[data.draw(st.integers(0, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "flipped"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            loaded = load(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert all(torch.isfinite(tensor).all() for tensor in loaded.model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(min_size=1, max_size=200))
@FUZZ
def test_noise_after_a_valid_beginning(tmp_path, originals, kind, data):
    path = tmp_path / "noise"
    path.write_bytes(originals[kind][:12] + data)
    refused(path)


@given(data=st.binary(max_size=400))
@FUZZ
def test_noise(tmp_path, data):
    path = tmp_path / "noise"
    path.write_bytes(data)
    refused(path)


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrap", ["bare", "torch", "legacy", "among weights"])
@pytest.mark.parametrize("function", ["system", "eval", "touch", "getattr"])
def test_pickles_with_code(tmp_path, wrap, function):
    effect = tmp_path / "effect"
    evil = {
        "system": Evil(os.system, f"touch {effect}"),
        "eval": Evil(eval, f"open({str(effect)!r}, 'w')"),
        "touch": Evil(Path.touch, effect),
        "getattr": Evil(getattr, Path(effect), "touch"),
    }[function]
    path = tmp_path / "evil.pth"
    if wrap == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        content = {"state_dict": {"a": torch.ones(2)}, "evil": evil} if wrap == "among weights" else evil
        torch.save(content, path, _use_new_zipfile_serialization=wrap != "legacy")
    assert "would run code when it is read" in refused(path)
    assert not effect.exists()


@pytest.mark.parametrize(
    "text",
    [
        *(b"# RepVGG\n\nA README, no checkpoint.\n", b"", b"{}", b'{"model": "repvgg_a0"}', b"12345678{not this one}"),
        *(b"cos\nsystem\n(S'touch effect'\ntR.", b"(dp0\n.", b"\x89PNG\r\n\x1a\n" + bytes(20), b"GIF89a", bytes(100)),
    ],
)
def test_other_files_are_no_checkpoints(tmp_path, text):
    """Pickles of protocols 0 and 1 are text, and are not opened."""
    path = tmp_path / "README.md"
    path.write_bytes(text)
    assert refused(path).endswith("is not a checkpoint." if text else "is not a checkpoint: it is empty.")


def test_namespaces_of_training_scripts_are_data(tmp_path):
    """timm stores its arguments in its checkpoints."""
    model = create_model(SPEC, 3)
    arguments = Namespace(lr=0.1, model="repvgg_a0")
    torch.save({"state_dict": model.state_dict(), "args": arguments}, tmp_path / "run.pth.tar")
    loaded = load(tmp_path / "run.pth.tar")
    assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert set(loaded.account.dropped) == {"args"}


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 2**39, 2**31, 10**8 + 1, 10**6])
def test_a_forged_header_length(tmp_path, length):
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4))
    refused(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    ],
)
def test_forged_header_entries(tmp_path, entry):
    header = json.dumps({"head.weight": entry}).encode()
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "is damaged" in refused(path)


def test_tensors_with_zero_strides_are_refused(tmp_path):
    """Four bytes on disk, 4 TiB when used."""
    torch.save({"head.weight": torch.ones(1).expand(2**20, 2**20)}, tmp_path / "bomb.pth")
    assert "larger than the file, in 'head.weight' first" in refused(tmp_path / "bomb.pth")


def test_compressed_archives_are_refused(tmp_path):
    """torch.save never compresses, and a few bytes may unpack to gigabytes."""
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    assert "it is a compressed archive" in refused(tmp_path / "bomb.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    state = create_model(SPEC, 3).state_dict()
    state["head.bias"] = torch.tensor([0.0, value, 1.0]).to(dtype)
    torch.save(state, tmp_path / "nan.pth")
    assert "values that are not finite, in 'head.bias' first" in refused(tmp_path / "nan.pth")


def test_save_torch_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_torch(path, {"a": torch.ones(2, requires_grad=True)})
    assert_close(read_checkpoint(path).tensors, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        save_torch(path, {"a": torch.zeros(2)})

    def fail(*arguments, **keywords):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(OutputError, match=r"could not be written: .*PytorchStreamWriter failed"):
        save_torch(path, {"a": torch.zeros(2)}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert path.read_bytes() == before


OTHER_FILES = {
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 32\n",
    "HTML": b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>",
    "(HTML)": b"<html><body>404",
    "ONNX": b"\x08\x08\x12\x07pytorch\x1a\x052.9.0:",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(20),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "NumPy": b"\x93NUMPY\x01\x00" + bytes(20),
    "XML": b"<?xml version='1.0'?><net/>",
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(20),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named(tmp_path, name):
    (tmp_path / "x.pth").write_bytes(OTHER_FILES[name])
    text = refused(tmp_path / "x.pth")
    assert "is not a checkpoint but" in text
    assert name in text


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"")
    assert "it is empty" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("entry", "what"), [("archive_format", "an exported program"), ("data/0", "without a data.pkl")]
)
def test_other_archives_are_named(tmp_path, entry, what):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr(f"x/{entry}", b"")
    assert what in refused(tmp_path / "x.pt")


def test_a_real_onnx_file_is_named(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), tmp_path / "x.onnx")
    assert "an ONNX file" in refused(tmp_path / "x.onnx")
    onnx.save(onnx.helper.make_model(graph), tmp_path / "y.onnx")
    assert "an ONNX file" in refused(tmp_path / "y.onnx")


def many_names(path, number):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"stages.0.{index}.{'x' * 100}.weight": entry for index in range(number)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [40_000, 150_000])
def test_very_many_names_in_a_safetensors_file(tmp_path, number):
    many_names(tmp_path / "x.safetensors", number)
    assert "is no network" in refused(tmp_path / "x.safetensors").replace("damaged, or no", "is no")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["torch", "legacy", "bare"])
def test_very_many_names_in_a_pickle(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("repvgg.checkpoints.torch_files.MAX_OPCODES", 20_000)
    content = {f"stages.0.{index}": 0.5 for index in range(10_000)}
    if kind == "bare":
        (tmp_path / "x.pth").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=kind == "torch")
    assert "is no network: its pickle has more than 20,000 opcodes" in refused(tmp_path / "x.pth")


def test_very_many_entries_in_an_archive(tmp_path):
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0)
    (tmp_path / "x.pth").write_bytes(b"PK\3\4" + bytes(100) + end)
    assert "more than 65,534 entries" in refused(tmp_path / "x.pth")


def test_one_tensor_under_many_names(tmp_path):
    """Each name is looked at once; different views of one storage may not add up to much more than the file."""
    base = torch.zeros(1000, 100)
    torch.save({f"k{index}": base for index in range(500)}, tmp_path / "same.pth")
    assert len(read_checkpoint(tmp_path / "same.pth").tensors) == 500
    torch.save({f"k{index}": base.view(-1)[index:] for index in range(500)}, tmp_path / "views.pth")
    assert "larger than the file" in refused(tmp_path / "views.pth")


@pytest.mark.parametrize(("dtype", "entry"), [("F4", [4]), ("F8_E8M0", [2])])
def test_number_formats_of_few_bits(tmp_path, dtype, entry):
    header = json.dumps({"head.weight": {"dtype": dtype, "shape": entry, "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    refused(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_float8(tmp_path, dtype):
    state = create_model(SPEC, 3).state_dict()
    torch.save({name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}, tmp_path / "x.pth")
    assert "which has no convolution: save them as float16 or float32" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["repvgg", "upstream", "timm", "mmpretrain"])
def test_negative_variances(tmp_path, layout, dtype):
    model = create_model(SPEC, 3).to(dtype)
    for name, tensor in model.state_dict().items():
        if name == "stages.1.0.conv.dense.bn.running_var":
            tensor[0] = -1e-3
    save(tmp_path / "x.pth", model, describe_model(model, "train"), layout=layout)
    assert "negative variances" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "changed",
    [
        *({"mean": [10**400] * 3}, {"mean": [float("nan")] * 3}, {"std": [0, 0, 0]}, {"std": [-1, 1, 1]}),
        *(
            {"std": [float("inf")] * 3},
            {"input_size": 2**31 - 1},
            {"input_size": 40_000},
            {"metrics": {"a": float("nan")}},
        ),
        *({"metrics": {"a": 10**400}}, {"form": "plain"}, {"num_classes": 10**400}),
        {"recipe": {"a": json.loads("[" * 300 + "]" * 300)}},
    ],
    ids=str,
)
def test_headers_with_impossible_values(tmp_path, originals, changed):
    model = create_model(SPEC, 3)
    header = json.loads(describe_model(model, "train").to_header()["repvgg"])
    save_file(model.state_dict(), tmp_path / "x.safetensors", {"repvgg": json.dumps({**header, **changed})})
    refused(tmp_path / "x.safetensors")
