"""Files of timm's RepVGG models: the same tensors and the same logits for every model that both libraries have."""

import pytest
import torch
from torch.testing import assert_close

from repvgg import list_models, load
from repvgg.checkpoints import recognize_names
from repvgg.models import SPECS, save
from repvgg.models.infer_spec import infer_spec
from tests.bn_statistics import trained_like

timm = pytest.importorskip("timm")
from timm.utils.model import reparameterize_model  # noqa: E402

BOTH = [name for name in list_models() if name in timm.list_models("repvgg*")]
SMALL = ("repvgg_a0", "repvgg_b0")
MODELS = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in BOTH]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def test_number_of_common_models():
    assert len(BOTH) == 11


def assert_same(theirs, path, name, form):
    """Reading the file of ``theirs`` and writing it back keeps every bit; the logits agree."""
    state = theirs.state_dict()
    torch.save(state, path)
    loaded = load(path, name)
    assert (loaded.metadata.form, loaded.account.layout) == (form, "timm")
    assert (loaded.account.dropped, loaded.account.filled, loaded.account.notes) == ({}, (), ())
    dtype = next(theirs.parameters()).dtype
    images = torch.randn(2, 3, 45, 71, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = theirs(images), loaded.model(images)
    tolerance = TOLERANCE[dtype] * float(wanted.abs().max())
    assert_close(found, wanted, rtol=0, atol=tolerance)
    save(path.with_name("back.pth"), loaded.model, loaded.metadata, layout="timm")
    back = torch.load(path.with_name("back.pth"), weights_only=True)
    assert_close(back, dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tensors(tmp_path, name):
    torch.manual_seed(0)
    assert_same(trained_like(timm.create_model(name, num_classes=17)).double(), tmp_path / "a.pth", name, "train")


def test_logits_in_float32(tmp_path):
    torch.manual_seed(0)
    assert_same(trained_like(timm.create_model("repvgg_a0")), tmp_path / "a.pth", "repvgg_a0", "train")


def test_plain_form_of_timm(tmp_path):
    torch.manual_seed(0)
    theirs = reparameterize_model(trained_like(timm.create_model("repvgg_a0", num_classes=17)).double()).eval()
    assert_same(theirs, tmp_path / "a.pth", "repvgg_a0", "plain")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_models_are_recognized_by_shapes(name, plain):
    """Every model in both forms, on the meta device."""
    with torch.device("meta"):
        theirs = timm.create_model(name)
        theirs = reparameterize_model(theirs) if plain else theirs
    naming = recognize_names(theirs.state_dict())
    assert (naming.layout.name, naming.unrecognized) == ("timm", ())
    shapes = {naming.used[key]: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    found = infer_spec(shapes, naming.layout.gate)
    assert (found.spec, found.form) == (SPECS[name], "plain" if plain else "train")
