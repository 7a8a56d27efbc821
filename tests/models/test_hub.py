"""The hub without a network: huggingface_hub runs on a cache that is laid out as a download leaves it."""

import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import repvgg
from repvgg import create_model, from_pretrained, load, push_to_hub, reparameterize
from repvgg.cli import main
from repvgg.errors import CheckpointError, FreshWeightsWarning, OutputError, SourceError, UnknownModelError, UsageError
from repvgg.models import PRETRAINED, SPECS, ModelSpec, Stage, describe_model, hub, load_pretrained, save
from tests.bn_statistics import trained_like

timm = pytest.importorskip("timm")
SHA, OLD = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
REPOSITORY = "timm/repvgg_a0.rvgg_in1k"


def cached(cache, repository, sha, write, *, main_branch=True):
    """Write a repository into the cache, as a download leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / sha
    snapshot.mkdir(parents=True)
    write(snapshot / "model.safetensors")
    if main_branch:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(sha)


@pytest.fixture(scope="module")
def theirs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained_like(timm.create_model("repvgg_a0"))


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory, theirs):
    cache = tmp_path_factory.mktemp("hub")
    cached(cache, REPOSITORY, SHA, lambda path: save_file(theirs.state_dict(), path))
    return cache


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Disable the network, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def online_cache(monkeypatch, offline, full_cache):
    """Disable the network, with the cache that a download has left."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(full_cache))
    return full_cache


def images(channels=3):
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


def logits(model, channels=3):
    with torch.no_grad():
        return model.eval()(images(channels))


def assert_logits_close(found, wanted):
    assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_table_agrees_with_timm():
    assert sorted(PRETRAINED) == sorted(name for name in SPECS if name in timm.list_models(pretrained=False))
    for name, published in PRETRAINED.items():
        config = timm.get_pretrained_cfg(name)
        assert (published.model, published.repository, published.licence) == (name, config.hf_hub_id, config.license)
        assert (published.input_size, published.crop) == (config.input_size[1], config.crop_pct)
        assert 72 < published.top1 < 84
        assert config.interpolation == "bilinear"


def test_pretrained_weights(online_cache, theirs):
    model = create_model("repvgg_a0", pretrained=True)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_logits_close(logits(model), logits(theirs))
    plain = create_model("repvgg_a0", plain=True, pretrained=True)
    assert repvgg.is_plain(plain)
    assert_logits_close(logits(plain), logits(theirs))


def test_metadata_of_pretrained_weights(online_cache):
    loaded = load_pretrained("repvgg_a0")
    about = loaded.metadata
    config = timm.get_pretrained_cfg("repvgg_a0")
    assert (about.mean, about.std, about.input_size) == (config.mean, config.std, 224)
    assert about.recipe == {"dataset": "ImageNet-1k", "interpolation": config.interpolation, "test_crop": 0.875}
    assert about.metrics == {"top1": pytest.approx(0.72426)}
    assert about.source == f"{REPOSITORY}@{SHA}"
    assert about.invalid_field() is None
    assert not loaded.model.training
    assert load_pretrained(SPECS["repvgg_a0"]).metadata == about


def test_pinned_revision(tmp_path, offline, theirs):
    state = theirs.state_dict()
    state["head.fc.bias"] = state["head.fc.bias"] + 1
    cached(offline, REPOSITORY, OLD, lambda path: save_file(state, path), main_branch=False)
    found = load_pretrained("repvgg_a0", revision=OLD)
    assert found.metadata.source.endswith(OLD)
    assert_close(found.model.head.bias.detach(), state["head.fc.bias"], rtol=0, atol=0)
    with pytest.raises(SourceError, match=f"{REPOSITORY} at {SHA} is not in the cache"):
        load_pretrained("repvgg_a0", revision=SHA)
    with pytest.raises(SourceError, match=REPOSITORY):
        load_pretrained("repvgg_a0")


@pytest.mark.parametrize("plain", [False, True])
def test_other_classes(online_cache, theirs, plain):
    with pytest.warns(FreshWeightsWarning, match="^'head' of repvgg_a0 have fresh weights"):
        model = create_model("repvgg_a0", 5, plain=plain, pretrained=True)
    assert model.num_classes == 5
    whole = create_model("repvgg_a0", plain=plain, pretrained=True)
    kept = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("head.")}
    state = model.state_dict()
    assert_close({name: state[name] for name in kept}, kept, rtol=0, atol=0)
    assert logits(model).shape == (2, 5)


def test_other_channels(online_cache):
    with pytest.warns(FreshWeightsWarning, match="^'head' and 'stem.conv' of repvgg_a0"):
        loaded = load_pretrained("repvgg_a0", num_classes=5, in_channels=1)
    about = loaded.metadata
    assert (about.in_channels, about.mean, about.std, about.metrics) == (1, (), (), {})
    whole = load_pretrained("repvgg_a0").model.state_dict()
    state = loaded.model.state_dict()
    fresh = [
        name for name in whole if state[name].shape != whole[name].shape or not torch.equal(state[name], whole[name])
    ]
    assert all(name.startswith(("stem.conv.", "head.")) for name in fresh)
    assert len(fresh) > 5
    assert logits(loaded.model, 1).isfinite().all()


def test_no_warning_without_fresh_weights(online_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained("repvgg_a0", num_classes=1000, in_channels=3)


def test_models_without_published_weights(offline):
    for name in ("repvgg_b1g2", "repvgg_t0", "repvggplus_l2pse", ModelSpec("repvgg_a0", Stage(1, 4), (Stage(1, 8),))):
        with pytest.raises(UsageError, match=r"no published weights of .* there are of repvgg_a0, "):
            create_model(name, pretrained=True)
    with pytest.raises(UnknownModelError, match="repvgg_a0"):
        create_model("repvgg_a00", pretrained=True)
    with pytest.raises(UsageError, match="at least one class"):
        create_model("repvgg_a0", 0, pretrained=True)


def test_offline_error_names_file_and_cache(offline):
    with pytest.raises(SourceError) as caught:
        create_model("repvgg_a0", pretrained=True)
    text = str(caught.value)
    assert all(part in text for part in ("'model.safetensors'", REPOSITORY, repr(str(offline))))
    assert "\n" not in text


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_offline_command_exits_with_2(offline, tmp_path, capsys, command):
    out = [str(tmp_path / "a.safetensors")] if command == "convert" else []
    assert main(["checkpoint", command, f"hub:{REPOSITORY}", *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: 'model.safetensors' of {REPOSITORY} is not in the cache")
    assert error.count("\n") == 1


def test_commands_read_the_hub(online_cache, tmp_path, capsys, theirs):
    assert main(["checkpoint", "inspect", f"hub:{REPOSITORY}", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["names"], about["model"], about["used"]) == ("timm", "repvgg_a0", len(theirs.state_dict()))
    assert main(["checkpoint", "convert", f"hub:{REPOSITORY}", str(tmp_path / "a.safetensors")]) == 0
    assert load(tmp_path / "a.safetensors").metadata.source == f"{REPOSITORY}@{SHA}"


def test_file_of_another_model_is_rejected(offline):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in timm.create_model("repvgg_a1").state_dict().items()}
    cached(offline, REPOSITORY, SHA, lambda path: save_file({n: torch.zeros(s) for n, s in shapes.items()}, path))
    with pytest.raises(CheckpointError, match="is a checkpoint of repvgg_a1, not of repvgg_a0"):
        create_model("repvgg_a0", pretrained=True)


def test_from_pretrained_reads_timm_repositories(online_cache, theirs):
    loaded = from_pretrained(REPOSITORY, plain=True)
    assert loaded.metadata.form == "plain"
    assert loaded.metadata.source == f"{REPOSITORY}@{SHA}"
    assert_logits_close(logits(loaded.model), logits(theirs))


class FakeHub:
    """Stores what is pushed to it in the cache, as after a download."""

    def __init__(self, cache):
        self.cache, self.calls, self.failure = cache, [], None

    def create_repo(self, repository, **options):
        self.calls.append((repository, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.failure:
            raise self.failure
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append((repo_id, sorted(files), commit_message))
        cached(self.cache, repo_id, SHA, lambda path: path.write_bytes(files["model.safetensors"]))
        self.card = files["README.md"].decode()
        return f"commit of {repo_id}"


@pytest.fixture
def fake(monkeypatch, offline):
    server = FakeHub(offline)
    monkeypatch.setattr(hub, "_api", lambda token: server)
    return server


def small():
    torch.manual_seed(0)
    return trained_like(create_model("repvgg_t0", 10, 1))


def test_push_and_load_again(fake):
    model = small()
    about = describe_model(
        model,
        "train",
        classes=tuple("0123456789"),
        mean=(0.5,),
        std=(0.25,),
        metrics={"top1": 0.9825, "loss": 0.1},
        recipe={"epochs": 12, "optim": {"lr": 0.1}},
        ema=True,
    )
    assert push_to_hub(model, "me/digits", about, licence="mit", private=True) == "commit of me/digits"
    assert fake.calls == [
        ("me/digits", {"private": True, "exist_ok": True}),
        ("me/digits", ["README.md", "model.safetensors"], "Upload a RepVGG model"),
    ]
    loaded = from_pretrained("me/digits")
    assert loaded.metadata == replace(about, source=f"me/digits@{SHA}")
    assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    card = huggingface_hub.ModelCard(fake.card)
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "repvgg",
        "pipeline_tag": "image-classification",
        "tags": ["repvgg", "structural-re-parameterization", "train-form"],
        "metrics": ["loss", "top1"],
    }
    for text in (
        *("# repvgg_t0", "| parameters | 203,050 |", "| input | 1 x 32 x 32 |", "| top1 | 0.9825 |", "0, 1, 2, 3"),
        *("| averaged weights | yes |", '"lr": 0.1', 'repvgg.from_pretrained("me/digits")', "plain=True", "under mit"),
        *("| mean of the pixels | 0.5 |", "| standard deviation | 0.25 |"),
    ):
        assert text in card.text


def test_card_omits_what_is_unknown(fake):
    plain = reparameterize(small())[0]
    push_to_hub(plain, "me/plain")
    card = huggingface_hub.ModelCard(fake.card)
    assert "license" not in card.data.to_dict()
    assert "No licence is stated" in card.text
    assert not any(title in card.text for title in ("## Metrics", "## Classes", "## Recipe", "mean of", "plain=True"))
    assert "plain form" in card.text
    assert from_pretrained("me/plain").metadata.form == "plain"


def test_card_escapes_class_names(fake):
    model = trained_like(create_model("repvgg_t0", 30, 1))
    names = ("a|b", "<script>", "back\\slash", *(f"class {number}" for number in range(27)))
    push_to_hub(model, "me/odd", describe_model(model, "train", classes=names))
    assert "a\\|b, &lt;script>, back\\\\slash, class 0" in fake.card
    assert "… (30 in all)" in fake.card
    assert "class 26" not in fake.card


def test_rejected_pushes(fake):
    model = small()
    with pytest.raises(UsageError, match="OWNER/NAME, not 'digits'"):
        push_to_hub(model, "digits")
    with pytest.raises(UsageError, match="'form' is 'plain', and the model's is 'train'"):
        push_to_hub(model, "me/digits", describe_model(model, "plain"))
    with pytest.raises(UsageError, match="'mean'"):
        push_to_hub(model, "me/digits", describe_model(model, "train", mean=(1.0, 2.0)))
    assert fake.calls == []
    fake.failure = OSError("403 Forbidden: no write access\nmore")
    with pytest.raises(OutputError, match=r"^me/digits could not be pushed to: 403 Forbidden: no write access\.$"):
        push_to_hub(model, "me/digits")


def test_fake_hub_has_the_signatures_of_the_client():
    """The calls recorded by FakeHub are valid for huggingface_hub."""
    api = hub._api(None)
    inspect.signature(api.create_repo).bind("me/digits", private=True, exist_ok=True)
    inspect.signature(api.upload_folder).bind(repo_id="me/digits", folder_path=".", commit_message="text")


def test_local_folders_and_files(tmp_path, offline):
    model = small()
    save(tmp_path / "model.safetensors", model, describe_model(model, "train"))
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert_close(from_pretrained(source).model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert from_pretrained(tmp_path, plain=True).metadata.form == "plain"
    with pytest.raises(UsageError, match="has no revision 'v1'"):
        from_pretrained(tmp_path, revision="v1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no 'model\.safetensors' in"):
        from_pretrained(tmp_path / "empty")
    for source in ("nothing", tmp_path / "not" / "there"):
        with pytest.raises(SourceError, match="neither a folder nor a repository OWNER/NAME"):
            from_pretrained(source)
    with pytest.raises(SourceError, match="of nobody/nothing is not in the cache"):
        from_pretrained("nobody/nothing")


def test_cache_dir(offline, full_cache, theirs):
    assert_close(
        load_pretrained("repvgg_a0", cache_dir=full_cache).model.head.bias.detach(),
        load_file(next(full_cache.rglob("model.safetensors")))["head.fc.bias"],
        rtol=0,
        atol=0,
    )
    assert from_pretrained(REPOSITORY, cache_dir=full_cache).metadata.model == "repvgg_a0"
