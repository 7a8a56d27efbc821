"""The model that a run starts with."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from repvgg.collapse import is_plain, reparameterize
from repvgg.data import open_data
from repvgg.errors import CheckpointError, UnknownModelError, UsageError
from repvgg.models import create_model, describe_model, load, registry, resolve, save
from repvgg.training import fit, seeded
from repvgg.training.initial_model import build_initial_model
from tests.bn_statistics import trained_like
from tests.training.helpers import CONFIG, fingerprint, opened
from tests.training.masks import SPEC, config_of, make_masks

CLASSES = ("0", "1", "2", "3")  # of the data


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A trained-like ``repvgg_t0`` in both forms, with the classes of the data and with others."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, classes in (("same", CLASSES), ("renamed", ("a", "b", "c", "d")), ("more", tuple("01234"))):
        with seeded(1):
            model = trained_like(create_model("repvgg_t0", len(classes), 3)).eval()
        plain, _ = reparameterize(model)
        for form, one in (("train", model), ("plain", plain)):
            about = describe_model(one, form, classes=classes, input_size=8)
            save(folder / f"{name}-{form}.safetensors", one, about)
    return folder


def initial(checkpoints, name, **changes):
    config = replace(CONFIG, model="", init=str(checkpoints / f"{name}.safetensors"), **changes)
    return build_initial_model(config, opened(config)), load(config.init).model


def backbone(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


def test_a_new_model_is_seeded_and_fits_the_data():
    torch.manual_seed(3)
    first = build_initial_model(CONFIG, opened()).model
    torch.manual_seed(4)
    second = build_initial_model(CONFIG, opened())
    assert second.notes == ()
    assert (first.num_classes, first.in_channels) == (4, 3)
    assert fingerprint(first) == fingerprint(second.model)
    assert fingerprint(build_initial_model(replace(CONFIG, seed=1), opened()).model) != fingerprint(first)


def test_no_model_or_an_unknown_one():
    with pytest.raises(UsageError, match="no model to train: name one of 'repvgg list', or give a checkpoint as init"):
        build_initial_model(replace(CONFIG, model=""), opened())
    with pytest.raises(UnknownModelError):
        build_initial_model(replace(CONFIG, model="repvgg_z9"), opened())
    with pytest.raises(CheckpointError):
        build_initial_model(replace(CONFIG, init="nowhere.safetensors"), opened())


def test_the_classifier_stays_if_the_classes_agree(checkpoints):
    start, source = initial(checkpoints, "same-train")
    assert_close(dict(start.model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    assert len(start.notes) == 1
    assert start.notes[0].endswith("same-train.safetensors, repvgg_t0 in the train form")


@pytest.mark.parametrize("name", ["renamed-train", "more-train"])
def test_the_classifier_is_replaced_if_the_classes_differ(checkpoints, name):
    start, source = initial(checkpoints, name)
    assert_close(backbone(start.model), backbone(source), rtol=0, atol=0)
    assert start.model.head.weight.shape == (4, 128)
    assert start.model.num_classes == 4
    assert (start.model.head.weight[:4] - source.head.weight[:4]).abs().max() > 1e-3
    assert start.notes[1] == f"new classifier for 4 classes in place of {source.num_classes}"
    assert fingerprint(start.model) == fingerprint(initial(checkpoints, name)[0].model)
    assert fingerprint(start.model) != fingerprint(initial(checkpoints, name, seed=1)[0].model)


def test_a_plain_checkpoint_warns(checkpoints):
    start, source = initial(checkpoints, "same-plain")
    assert is_plain(start.model)
    assert_close(dict(start.model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    assert start.notes[1].startswith("warning: trains a plain model, without branches")


def test_an_expanded_model_computes_the_same(checkpoints, tmp_path):
    start, plain = initial(checkpoints, "same-plain", expand=True)
    assert not is_plain(start.model)
    assert start.notes[1] == "expanded 7 convolutions into branches that compute the same"
    data = opened()
    images = data.val_images(range(19))[0].double()
    with torch.no_grad():
        found, expected = start.model.double().eval()(images), plain.double().eval()(images)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the weights of the file are rounded to float32
    fit(start.model.float(), data, replace(CONFIG, epochs=1, optim=replace(CONFIG.optim, lr=1e-3)), progress=False)
    save(tmp_path / "trained.safetensors", start.model, describe_model(start.model, "train"))
    again = load(tmp_path / "trained.safetensors")
    assert again.metadata.form == "train"
    assert fingerprint(again.model) == fingerprint(start.model)
    again_plain, report = reparameterize(again.model)
    assert is_plain(again_plain)
    assert len(report.folded) == 7


def test_unsuitable_checkpoints_are_rejected(checkpoints):
    with pytest.raises(UsageError, match="has its branches already: leave out expand"):
        initial(checkpoints, "same-train", expand=True)
    grey = replace(CONFIG, init=str(checkpoints / "same-train.safetensors"), data=replace(CONFIG.data, channels=1))
    with pytest.raises(
        UsageError, match=r"takes images of 3 channels, but fake:96x4 has 1: set data\.channels to 3\.$"
    ):
        build_initial_model(grey, opened(grey))
    with pytest.raises(CheckpointError):
        build_initial_model(
            replace(CONFIG, model="repvgg_a0", init=str(checkpoints / "same-train.safetensors")), opened()
        )


@pytest.fixture
def tiny_network(monkeypatch):
    monkeypatch.setitem(registry.PSPNETS, SPEC.name, SPEC)
    monkeypatch.setitem(registry.ARCHITECTURES, SPEC.name, SPEC)


def segmenter(uri, checkpoint, **changes):
    config = config_of(uri, init=str(checkpoint), **changes)
    return build_initial_model(config, open_data(config.data))


def test_a_segmentation_network_takes_the_backbone_of_a_classifier(tiny_network, checkpoints, tmp_path):
    """In the train form as it is; a plain one is expanded into branches that compute the same."""
    uri = make_masks(tmp_path / "shapes")
    path = checkpoints / "same-train.safetensors"
    trained, classifier = segmenter(uri, path), load(path).model
    assert trained.notes == (f"the backbone starts from {path}, repvgg_t0 in the train form; the heads are new",)
    for name, value in trained.model.backbone.state_dict().items():
        assert_close(value, classifier.state_dict()[name], rtol=0, atol=0)
    x = torch.randn(2, 3, 33, 33)
    features = classifier.eval().features(x)[-1]
    assert_close(trained.model.eval().backbone.features(x)[-1], features)
    expanded = segmenter(uri, checkpoints / "same-plain.safetensors")
    assert expanded.notes[1].startswith("expanded 7 convolutions into branches")
    assert not is_plain(expanded.model)
    assert_close(expanded.model.eval().backbone.features(x)[-1], features, rtol=1e-3, atol=1e-4)
    heads = [fingerprint(one.model.head) for one in (trained, expanded, segmenter(uri, path))]
    assert heads[0] == heads[2]  # seeded


def test_backbones_that_do_not_fit_are_rejected(tiny_network, checkpoints, tmp_path):
    uri = make_masks(tmp_path / "shapes")
    with pytest.raises(UsageError, match="has its branches already"):
        segmenter(uri, checkpoints / "same-train.safetensors", expand=True)
    with pytest.raises(CheckpointError, match="is a checkpoint of repvgg_t0, not of repvgg_a0"):
        segmenter(uri, checkpoints / "same-train.safetensors", model="pspnet_repvgg_a0")
    with pytest.raises(UsageError, match="has masks, but repvgg_t0 is a classifier"):
        segmenter(uri, checkpoints / "same-train.safetensors", model="")


def test_a_resnet_backbone_starts_from_torchvisions_names(tmp_path):
    uri = make_masks(tmp_path / "shapes")
    resnet = resolve("torchvision:resnet18", num_classes=7).model
    torch.save(trained_like(resnet).state_dict(), tmp_path / "resnet18.pth")
    initial = segmenter(uri, tmp_path / "resnet18.pth", model="pspnet_resnet18")
    for name, value in initial.model.backbone.state_dict().items():
        assert_close(value, resnet.state_dict()[name], rtol=0, atol=0)
