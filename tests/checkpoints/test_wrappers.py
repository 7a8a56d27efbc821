"""Dictionaries, prefixes and NumPy numbers that training scripts put around and beside the weights."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from repvgg.checkpoints import read_checkpoint
from repvgg.checkpoints.numpy_pickle import PickledArray, PickledDtype
from repvgg.checkpoints.wrappers import candidate_prefixes, common_prefix, unwrap
from repvgg.errors import CheckpointError

WEIGHTS = {"stem.weight": torch.arange(6.0).reshape(2, 3), "stem.bn.running_var": torch.ones(2)}
PARAMETERS = {"stem.weight": torch.zeros(2, 3)}


def read(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    return read_checkpoint(tmp_path / "x.pth")


SECTIONS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights"),
    *("ema", "params_ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "module"),
)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("inner", ["", "module", "state_dict"])
def test_dictionaries_are_opened(tmp_path, section, inner):
    content = {section: {inner: WEIGHTS, "decay": 0.9} if inner else WEIGHTS, "epoch": 3}
    found = read(tmp_path, content)
    assert_close(found.tensors, WEIGHTS, rtol=0, atol=0)
    assert found.section == (f"{section}.{inner}" if inner else section)
    assert found.averaged == ("ema" in section)
    assert set(found.skipped) == {"epoch", f"{section}.decay"} if inner else {"epoch"}


@pytest.mark.parametrize(
    "prefix", ["net.", "backbone.", "encoder.", "network.", "model.net.", "module._orig_mod.model."]
)
def test_prefixes_are_removed(tmp_path, prefix):
    found = read(tmp_path, {prefix + name: tensor for name, tensor in WEIGHTS.items()})
    assert found.prefix == prefix
    assert_close(found.tensors, WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ema", "params_ema", "model_ema"])
def test_an_average_without_statistics_is_not_taken(tmp_path, name):
    found = read(tmp_path, {name: PARAMETERS, "model": WEIGHTS})
    assert (found.section, found.averaged) == ("model", False)
    assert "lacks 'stem.bn.running_var'; model was taken" in found.skipped[name]
    found = read(tmp_path, {name: {f"module.{key}": tensor for key, tensor in WEIGHTS.items()}, "model": WEIGHTS})
    assert (found.section, found.averaged) == (name, True)
    assert "another copy" in found.skipped["model"]
    found = read(tmp_path, {name: {"decay": 0.9}, "model": WEIGHTS})
    assert found.section == "model"


def test_unknown_dictionaries_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds weights as 'generator', 'critic': save the one to be read"):
        read(tmp_path, {"generator": WEIGHTS, "critic": WEIGHTS, "epoch": 1})


def test_tensors_beside_the_weights_are_told(tmp_path):
    found = read(tmp_path, {"model": WEIGHTS, "temperature": torch.ones(1)})
    assert found.skipped == {"temperature": "beside the weights in model"}


def test_dictionaries_that_contain_themselves():
    content = {}
    content |= dict.fromkeys(SECTIONS, content)
    assert unwrap(content).tensors == {}
    content["weights"] = {"net": content, "a": torch.ones(1)}
    assert unwrap(content).section == "weights"


NUMPY = {
    "float64": np.float64(71.2),
    "float32": np.float32(0.5),
    "int64": np.int64(-3),
    "bool": np.bool_(True),
    "array": np.arange(4),
    "text": np.str_("x"),
    "array of text": np.array(["a", "b"]),
    "big-endian": np.array([1.5, 2], ">f8"),
    "path": Path("runs/a0"),
}


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("legacy", [False, True])
def test_numpy_beside_the_weights(tmp_path, name, legacy):
    content = {"state_dict": WEIGHTS, "best_acc1": NUMPY[name]}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "x.pth")
    assert_close(found.tensors, WEIGHTS, rtol=0, atol=0)
    assert set(found.skipped) == {"best_acc1"}


@pytest.mark.parametrize("dtype", [">f4", "f8", "f2", "i8", "u1", "?"])
def test_weights_as_numpy_arrays(tmp_path, dtype):
    values = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    found = read(tmp_path, {"rows": values, "columns": np.asfortranarray(values), "scalar": np.array(values[0, 1])})
    expected = torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    assert_close(found.tensors, {"rows": expected, "columns": expected, "scalar": expected[0, 1]}, rtol=0, atol=0)


def test_forged_numpy_pickles():
    dtype = PickledDtype("f8")
    for order in ("x", None, 3):
        with pytest.raises(pickle.UnpicklingError):
            PickledDtype("f8").__setstate__((3, order))
    for shape in ((2**40,), (-1, -1), (1.0,), "x", (True,)):
        with pytest.raises(pickle.UnpicklingError):
            PickledArray().__setstate__((1, shape, dtype, False, bytes(4)))
    for code in ("O", "O8", "V8", "U4", "f8,f8", "S3", None):
        array = PickledArray()
        array.__setstate__((1, (1,), PickledDtype(code), False, bytes(8)))
        assert array.tensor() is None
    with pytest.raises(pickle.UnpicklingError):
        PickledArray().__setstate__((1, (1,), PickledDtype("f99"), False, bytes(8)))


def test_deep_prefixes_take_little_time():
    names = ["module." * 2000 + f"k{number}" for number in range(3000)]
    assert common_prefix(names) == "module." * 8
    assert len(candidate_prefixes(names)) == 9
    mixed = ["model." * (number % 3) + "net." * (number % 5) + "encoder." * (number % 2) for number in range(3000)]
    assert len(candidate_prefixes(mixed)) <= 17
