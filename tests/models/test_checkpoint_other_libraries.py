"""Checkpoints of other libraries: recognized by structure, read completely, written back bit for bit."""

from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from repvgg import create_model, load, reparameterize
from repvgg.checkpoints import read_checkpoint
from repvgg.errors import CheckpointError, UsageError
from repvgg.models import SPECS, ModelSpec, SqueezeExciteSpec, Stage, describe_model, load_weights, save
from tests.bn_statistics import trained_like
from tests.models import other_libraries as nets
from tests.models.helpers import TINY_PLUS

NETWORKS = {
    "upstream": (nets.SMALL, nets.UPSTREAM_NAMES),
    "upstream gated": (nets.GATED, nets.UPSTREAM_NAMES),
    "upstream_plus": (nets.PLUS, nets.PLUS_NAMES),
    "mmpretrain": (nets.SMALL, nets.MMPRETRAIN_NAMES),
    "mmpretrain gated": (nets.GATED, nets.MMPRETRAIN_NAMES),
}
CASES = [(name, plain) for name in NETWORKS for plain in (False, True)]


def written(path, tensors):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def network(name, plain=False):
    net, names = NETWORKS[name]
    return net, names, nets.state_dict(net, names, plain)


def images(channels=3, size=(37, 33)):
    return torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "plain"), CASES)
def test_loaded_model_is_the_same_function(tmp_path, name, plain):
    net, names, tensors = network(name, plain)
    loaded = load(written(tmp_path / "a.pth", tensors))
    assert loaded.metadata.form == ("plain" if plain else "train")
    assert loaded.account.layout == name.partition(" ")[0]
    assert set(loaded.account.used) == set(tensors)
    assert loaded.account.dropped == {}
    state = loaded.model.state_dict()
    assert_close({file: state[ours] for file, ours in loaded.account.used.items()}, tensors, rtol=0, atol=0)
    wanted = nets.logits(net, names, tensors, images())
    assert wanted.std() > 1e-3
    with torch.no_grad():
        assert_close(loaded.model(images()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_spec_is_inferred_from_shapes(tmp_path, name):
    net, names, tensors = network(name)
    spec = load(written(tmp_path / "a.pth", tensors)).model.spec
    assert [(stage.depth, stage.channels) for stage in spec.stages] == list(zip(net.depths, net.widths, strict=True))
    assert (spec.stem.channels, spec.groups) == (net.stem, net.groups)
    gate = SqueezeExciteSpec("after_relu" if names.gate_last else "before_relu", 4) if net.reduction else None
    assert spec.squeeze_excite == gate
    assert spec.auxiliary == ((0, 1, 2) if names.gate_last else ())


def test_a0_of_the_authors(tmp_path):
    tensors = nets.state_dict(nets.A0, nets.UPSTREAM_NAMES)
    loaded = load(written(tmp_path / "a.pth", tensors), "repvgg_a0")
    assert loaded.model.spec is SPECS["repvgg_a0"]
    assert loaded.account.notes == ()
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 9108968
    with torch.no_grad():
        wanted = nets.logits(nets.A0, nets.UPSTREAM_NAMES, tensors, images())
        assert_close(loaded.model(images()), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


WRAPPINGS = {
    "module": lambda t: {f"module.{name}": tensor for name, tensor in t.items()},
    "compiled": lambda t: {f"module._orig_mod.model.{name}": tensor for name, tensor in t.items()},
    "model": lambda t: {"model": t, "epoch": 3, "optimizer": {"state": {}}},
    "averaged": lambda t: {"n_averaged": torch.tensor(5), **{f"module.{name}": tensor for name, tensor in t.items()}},
    "timm": lambda t: {"state_dict": {name: tensor + 1 for name, tensor in t.items()}, "state_dict_ema": t, "epoch": 3},
    "model_ema": lambda t: {"model": {}, "model_ema": {f"module.{name}": tensor for name, tensor in t.items()}},
    "counted": lambda t: {**t, "total_ops": torch.zeros(1), "linear.total_params": torch.zeros(1)},
}
DROPPED = {
    "model": {"epoch": "training run", "optimizer": "training run"},
    "averaged": {"n_averaged": "counts the models"},
    "timm": {"state_dict": "another copy of the weights; state_dict_ema was taken", "epoch": "training run"},
    "model_ema": {"model": "another copy"},
    "counted": {"total_ops": "FLOP counter", "linear.total_params": "FLOP counter"},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_are_removed_and_reported(tmp_path, wrapping):
    _, _, tensors = network("upstream")
    loaded = load(written(tmp_path / "a.pth", WRAPPINGS[wrapping](tensors)))
    state = loaded.model.state_dict()
    assert_close(
        {name: state[ours] for name, ours in zip(tensors, loaded.account.used.values(), strict=True)},
        tensors,
        rtol=0,
        atol=0,
    )
    wanted = DROPPED.get(wrapping, {})
    assert set(loaded.account.dropped) == set(wanted)
    assert all(reason in loaded.account.dropped[name] for name, reason in wanted.items())
    assert loaded.metadata.ema == (wrapping in ("timm", "model_ema"))
    sections = {"model": "model", "timm": "state_dict_ema", "model_ema": "model_ema"}
    assert loaded.account.section == sections.get(wrapping, "")
    prefixes = {"compiled": "module._orig_mod.model."} | dict.fromkeys(("module", "averaged", "model_ema"), "module.")
    assert loaded.account.prefix == prefixes.get(wrapping, "")


@pytest.mark.parametrize(
    "name", ["criterion.weight", "model.loss_fn.class_weights", "ce_loss.weight", "loss.0.log_vars"]
)
def test_weights_of_losses_are_told(tmp_path, name):
    _, _, tensors = network("upstream")
    content = {**{f"model.{key}": tensor for key, tensor in tensors.items()}, name: torch.ones(10)}
    loaded = load(written(tmp_path / "a.pth", content))
    (told,) = loaded.account.dropped.items()
    assert told[1] == "it belongs to a loss"
    assert set(loaded.account.used.values()) == set(loaded.model.state_dict()) - set(loaded.account.filled)


def test_two_networks_in_one_file(tmp_path):
    _, _, tensors = network("upstream")
    content = {f"{prefix}.{key}": tensor for prefix in ("encoder", "net") for key, tensor in tensors.items()}
    text = rejection(written(tmp_path / "a.pth", content))
    assert "holds several networks, such as 'net.' and 'encoder.': save one of them" in text


def rejection(path, *arguments, **keywords):
    with pytest.raises(CheckpointError) as caught:
        load(path, *arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(tensors, *parts):
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


INVALID = {
    "leftover": (lambda t: t | {"extra.weight": torch.zeros(1)}, "but 1 key is unexpected ('extra.weight')"),
    "leftovers": (
        lambda t: t | {f"extra.{n}": torch.zeros(1) for n in range(5)},
        "but 5 keys are unexpected ('extra.0', 'extra.1', …)",
    ),
    "our name too": (lambda t: t | {"head.weight": torch.zeros(7, 20)}, "but 1 key is unexpected ('head.weight')"),
    "missing": (lambda t: without(t, "stage2.0.rbr_1x1.bn.bias"), "but 1 key is missing ('stage2.0.rbr_1x1.bn.bias')"),
    "no head": (lambda t: without(t, "linear."), "no RepVGG: its classifier is missing"),
    "no stem": (lambda t: without(t, "stage0."), "no RepVGG: it has no stem"),
    "no stage": (lambda t: without(t, "stage2."), "a stage or a block between others is missing"),
    "no block": (lambda t: without(t, "stage3.1."), "a stage or a block between others is missing"),
    "mixed forms": (
        lambda t: without(t, "stage3.1.") | {"stage3.1.rbr_reparam.weight": torch.zeros(16, 16, 3, 3)},
        "some of its blocks have branches",
    ),
    "shape": (
        lambda t: t | {"stage1.0.rbr_1x1.bn.bias": torch.zeros(9)},
        "1 key has another shape ('stage1.0.rbr_1x1.bn.bias' (9,) instead of (8,))",
    ),
    "kernel": (lambda t: t | {"stage1.0.rbr_dense.conv.weight": torch.zeros(8, 8, 5, 5)}, "(8, 8, 5, 5)"),
    "width": (lambda t: t | {"stage1.1.rbr_dense.conv.weight": torch.zeros(9, 4, 3, 3)}, "several widths"),
    "groups": (lambda t: t | {"stage1.0.rbr_dense.conv.weight": torch.zeros(8, 5, 3, 3)}, "channels a group"),
    "empty": (lambda t: t | {"stage1.0.rbr_dense.conv.weight": torch.zeros(8, 0, 3, 3)}, "(8, 0, 3, 3)"),
    "not finite": (lambda t: t | {"linear.bias": torch.full((7,), torch.nan)}, "not finite, in 'linear.bias' first"),
    "types": (lambda t: t | {"linear.bias": torch.zeros(7).half()}, "several types, float16 and float32"),
    "other network": (lambda t: {f"layer{n}.weight": torch.zeros(2) for n in range(9)}, "no RepVGG: its names are not"),
    "nothing": (lambda t: {"layer": torch.zeros(1), "stage0.rbr_reparam.weight": torch.zeros(1)}, "no RepVGG"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_files(tmp_path, case):
    change, text = INVALID[case]
    path = written(tmp_path / "a.pth", change(nets.state_dict(nets.SMALL, nets.UPSTREAM_NAMES)))
    found = rejection(path)
    assert text in found
    assert repr(str(path)) in found


def test_gates_in_some_blocks_only(tmp_path):
    tensors = nets.state_dict(nets.GATED, nets.UPSTREAM_NAMES)
    assert "same gate" in rejection(written(tmp_path / "a.pth", without(tensors, "stage2.0.se")))


def test_missing_counters_stay_missing(tmp_path):
    _, _, tensors = network("upstream")
    old = without(tensors, "num_batches_tracked")
    loaded = load(written(tmp_path / "a.pth", old))
    assert len(loaded.account.filled) == len(tensors) - len(old) > 0
    assert all(int(loaded.model.state_dict()[name]) == 0 for name in loaded.account.filled)
    save(tmp_path / "b.safetensors", loaded.model, loaded.metadata, without=loaded.account.filled)
    again = load(tmp_path / "b.safetensors")
    assert again.account.filled == loaded.account.filled
    save(tmp_path / "c.pth", again.model, again.metadata, layout="upstream", without=again.account.filled)
    assert_close(torch.load(tmp_path / "c.pth", weights_only=True), old, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("name", "plain"), CASES)
def test_round_trip_is_bit_exact(tmp_path, name, plain, suffix):
    _, _, tensors = network(name, plain)
    source, ours, back = (tmp_path / f"{part}{suffix}" for part in ("source", "ours", "back"))
    loaded = load(written(source, tensors))
    save(ours, loaded.model, loaded.metadata)
    again = load(ours)
    assert again.metadata == loaded.metadata
    assert again.account.header
    save(back, again.model, again.metadata, layout=name.partition(" ")[0].partition("_")[0])
    found = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
    assert_close(found, tensors, rtol=0, atol=0)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}


@pytest.mark.parametrize("layout", ["upstream", "timm", "mmpretrain", "repvgg"])
@pytest.mark.parametrize("plain", [False, True])
def test_header_is_kept_in_every_layout(tmp_path, layout, plain):
    """The header of a safetensors file stores what names and shapes do not determine, such as strides."""
    torch.manual_seed(0)
    spec = ModelSpec("mine", Stage(1, 8, stride=1), (Stage(2, 8, stride=1), Stage(1, 12, stride=3)), input_size=20)
    model = trained_like(create_model(spec, 5, 2, plain))
    about = describe_model(
        model, "plain" if plain else "train", classes=tuple("abcde"), metrics={"top1": 0.5}, ema=True
    )
    save(tmp_path / "a.safetensors", model, about, layout=layout)
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.metadata == about
    assert loaded.model.spec == spec
    assert loaded.account.layout == layout
    assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        assert_close(loaded.model(images(2)), model(images(2)), rtol=0, atol=0)
    assert "of mine, not of repvgg_t0" in rejection(tmp_path / "a.safetensors", "repvgg_t0")


def test_custom_spec_with_a_registered_name(tmp_path):
    spec = ModelSpec("repvgg_t0", Stage(1, 4), (Stage(1, 8),))
    model = create_model(spec, 3)
    save(tmp_path / "a.safetensors", model, describe_model(model, "train"))
    assert load(tmp_path / "a.safetensors").model.spec == spec
    assert "not of repvgg_t0" in rejection(tmp_path / "a.safetensors", "repvgg_t0")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"stages": []}, "has no stage"),
        ({"stages": [{"depth": 10**6 - 1, "channels": 1, "stride": 1}]}, "more blocks than it has tensors"),
        ({"stages": [{"depth": 10**9, "channels": 1, "stride": 1}]}, "describes no model"),
        ({"stages": [{"depth": True, "channels": 1, "stride": 1}]}, "describes no model"),
        ({"stages": 5}, "describes no model"),
        ({"stem": None}, "describes no model"),
        ({"groups": 0}, "describes no model"),
        ({"squeeze_excite": {"place": "nowhere", "reduction": 4}}, "describes no model"),
        ({"squeeze_excite": {"place": "after_relu"}}, "describes no model"),
        ({"auxiliary": [7]}, "has no stage for each auxiliary head"),
        ({"groups": 3}, "groups"),
    ],
)
def test_invalid_specs_in_headers(tmp_path, change, text):
    spec = ModelSpec("mine", Stage(1, 8), (Stage(2, 8), Stage(1, 12)))
    model = create_model(spec, 3)
    about = describe_model(model, "train")
    save(tmp_path / "a.safetensors", model, replace(about, spec={**about.spec, **change}))
    assert text in rejection(tmp_path / "a.safetensors")


def test_plain_form_from_train_form_file(tmp_path):
    net, names, tensors = network("upstream_plus")
    path = written(tmp_path / "a.pth", tensors)
    loaded = load(path, plain=True)
    assert loaded.metadata.form == "plain"
    assert list(loaded.model.state_dict()) == list(create_model(loaded.model.spec, 7, plain=True).state_dict())
    with torch.no_grad():
        assert_close(loaded.model(images()), nets.logits(net, names, tensors, images()), rtol=1e-4, atol=1e-5)
    heads = {name for name in tensors if "_aux." in name}
    assert {name for name, reason in loaded.account.dropped.items() if "auxiliary head" in reason} == heads
    assert set(loaded.account.used) == set(tensors) - heads
    assert "collapsed" in loaded.account.notes[-1]


def test_plain_file_cannot_be_loaded_in_train_form(tmp_path):
    path = written(tmp_path / "a.pth", network("upstream", plain=True)[2])
    assert "repvgg.expand" in rejection(path, plain=False)
    assert load(path, plain=True).metadata.form == "plain"
    train = written(tmp_path / "b.pth", network("upstream")[2])
    assert load(train, plain=False).metadata.form == "train"


def test_auxiliary_heads_of_plain_files_are_dropped(tmp_path):
    """The authors' switch_to_deploy of single blocks leaves them in the file."""
    _, _, plain = network("upstream_plus", plain=True)
    heads = {name: tensor for name, tensor in network("upstream_plus")[2].items() if "_aux." in name}
    loaded = load(written(tmp_path / "a.pth", plain | heads))
    assert set(loaded.account.dropped) == set(heads)
    assert set(loaded.account.used) == set(plain)


def test_unknown_gate_position(tmp_path):
    model = create_model(TINY_PLUS, 5)
    assert "which its names do not reveal: save it with a header" in rejection(
        written(tmp_path / "a.pth", model.state_dict())
    )


def test_models_that_other_layouts_do_not_support(tmp_path):
    model = create_model(TINY_PLUS, 5)
    about = describe_model(model, "train")
    for layout in ("timm", "mmpretrain"):
        with pytest.raises(UsageError, match=f"{layout} has no model with squeeze-excite after the ReLU"):
            save(tmp_path / "a.pth", model, about, layout=layout)
    heads = create_model(ModelSpec("heads", Stage(1, 4), (Stage(1, 8), Stage(1, 8)), auxiliary=(0,)), 3)
    with pytest.raises(UsageError, match=r"timm has no name for 'auxiliary\.stage0"):
        save(tmp_path / "a.pth", heads, describe_model(heads, "train"), layout="timm")
    with pytest.raises(UsageError, match="no layout 'torchvision': choose repvgg"):
        save(tmp_path / "a.pth", heads, describe_model(heads, "train"), layout="torchvision")
    assert list(tmp_path.iterdir()) == []


def test_load_weights_reads_other_layouts(tmp_path):
    _, _, tensors = network("mmpretrain")
    path = written(tmp_path / "a.pth", tensors)
    loaded = load(path)
    spec = loaded.model.spec
    model = create_model(spec, 7)
    load_weights(model, path)
    assert_close(model.state_dict(), loaded.model.state_dict(), rtol=0, atol=0)
    plain = create_model(spec, 7, plain=True)
    load_weights(plain, path)
    assert_close(plain.state_dict(), reparameterize(loaded.model)[0].state_dict(), rtol=0, atol=0)
    save(tmp_path / "plain.pth", plain, describe_model(plain, "plain"), layout="timm")
    with pytest.raises(CheckpointError, match=r"has no branches.*repvgg\.expand"):
        load_weights(model, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"1 key is unexpected \('extra'\)"):
        load_weights(model, written(tmp_path / "b.pth", tensors | {"extra": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"have? other shapes? .*instead of"):
        load_weights(create_model(spec, 9), path)


def test_torch_file_has_a_header(tmp_path):
    model = trained_like(create_model("repvgg_t0", 10, 1))
    about = describe_model(model, "train", recipe={"epochs": 3}, classes=tuple("0123456789"))
    save(tmp_path / "a.pth", model, about)
    assert load(tmp_path / "a.pth").metadata == about
    assert set(torch.load(tmp_path / "a.pth", weights_only=True)) == {"state_dict", "repvgg"}
    assert read_checkpoint(tmp_path / "a.pth").skipped == {}
    assert asdict(about)["spec"] is None
