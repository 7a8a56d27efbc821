"""Configs: valid ranges, YAML and back, and the messages about invalid files."""

from dataclasses import asdict, replace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from repvgg._serde import from_plain
from repvgg.data import AffineJitter, Augment, DataConfig
from repvgg.errors import UsageError
from repvgg.training import (
    RECIPES,
    OptimConfig,
    TrainConfig,
    quickstart,
    read_config,
    recipe_of,
    to_yaml,
    write_config,
)
from repvgg.training.config import differences
from tests.training.helpers import CONFIG

UNIT = st.floats(0, 1)
POSITIVE = st.floats(1e-6, 100)
AUGMENTS = st.builds(
    Augment,
    crop=st.sampled_from(["none", "random-resized", "pad"]),
    crop_padding=st.integers(0, 8),
    crop_scale=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
    crop_ratio=st.tuples(st.floats(0.1, 1), st.floats(1, 10)),
    flip=UNIT,
    policy=st.sampled_from(["none", "autoaugment", "autoaugment-cifar10", "randaugment", "trivialaugment"]),
    randaugment_ops=st.integers(1, 5),
    randaugment_magnitude=st.integers(0, 30),
    erase=UNIT,
    erase_size=st.floats(0.01, 1),
    jitter=st.builds(AffineJitter, degrees=st.floats(0, 180), translate=st.floats(0, 0.9), scale=st.floats(0, 0.9)),
)
DATA = st.builds(
    DataConfig,
    uri=st.text(max_size=20),
    val=st.none() | st.text(max_size=20),
    train_size=st.none() | st.integers(1, 512),
    test_size=st.none() | st.integers(1, 512),
    crop_fraction=st.floats(0.01, 1),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    channels=st.just(3) | st.none(),
    mean=st.none() | st.tuples(*3 * [UNIT]),
    std=st.none() | st.tuples(*3 * [POSITIVE]),
    augment=AUGMENTS,
    workers=st.integers(0, 64),
    on_bad=st.sampled_from(["raise", "skip"]),
    cache=st.sampled_from(["auto", "memory", "none"]),
)
OPTIMS = st.builds(
    OptimConfig,
    lr=POSITIVE,
    lr_batch=st.none() | st.integers(1, 4096),
    momentum=st.floats(0.01, 0.99),
    nesterov=st.booleans(),
    weight_decay=UNIT,
    decay=st.sampled_from(["paper", "upstream", "upstream-2021", "no-1d"]),
    custom_l2=st.booleans(),
    norm_bias_lr=st.floats(0.01, 64),
    warmup_epochs=st.floats(0, 0.9),
    clip=st.none() | POSITIVE,
)
CONFIGS = st.builds(
    TrainConfig,
    model=st.text(max_size=20),
    recipe=st.text(max_size=20),
    epochs=st.integers(1, 600),
    batch_size=st.integers(2, 4096),
    device_batch=st.none() | st.integers(1, 4096),
    data=DATA,
    optim=OPTIMS,
    label_smoothing=st.floats(0, 0.9),
    mixup=UNIT,
    cutmix=UNIT,
    auxiliary_weight=UNIT,
    progressive=st.sampled_from([(), ((0.5, 0.75),), ((0.25, 0.5), (1.0, 0.75))]),
    ema=st.floats(0, 0.999),
    init=st.text(max_size=20),
    expand=st.booleans(),
    precision=st.sampled_from(["float32", "bf16", "fp16"]),
    channels_last=st.booleans(),
    compile=st.booleans(),
    sync_bn=st.booleans(),
    dry_run=st.booleans(),
    save_steps=st.integers(0, 1000),
    seed=st.integers(-(2**31), 2**31),
    threads=st.none() | st.integers(1, 64),
    accelerator=st.sampled_from(["auto", "cpu", "gpu"]),
    devices=st.none() | st.integers(1, 8),
    nodes=st.none() | st.integers(1, 8),
)


def parse(text):
    return from_plain(TrainConfig, yaml.safe_load(text), "the config")


@settings(max_examples=50)  # PyYAML takes 20 ms for each of them
@given(config=CONFIGS)
@example(config=TrainConfig(init="a\x85b", model="\x85", recipe="\u2028 \n"))  # YAML folds line breaks
def test_every_field_survives_yaml(config):
    assert parse(to_yaml(config)) == config
    assert differences(config, parse(to_yaml(config))) == {}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_a_file(tmp_path, name):
    config = recipe_of(name)
    assert config.recipe == name
    path = write_config(tmp_path / "config.yaml", config)
    assert read_config(path) == config
    assert list(yaml.safe_load(path.read_text())) == list(asdict(config))  # complete, in declaration order


def test_missing_fields_take_their_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: repvgg_a0\nepochs: 3\noptim: {lr: 1}\n")
    assert read_config(tmp_path / "mine.yaml") == TrainConfig(model="repvgg_a0", epochs=3, optim=OptimConfig(lr=1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "has no field 'epoch': there are accelerator, auxiliary_weight"),
        ("optim: {rate: 1}", ": optim has no field 'rate': there are clip, custom_l2, decay, head_lr, lr"),
        ("data: {augment: {flips: 1}}", ": data: augment has no field 'flips'"),
        ("epochs: three", ": epochs has to be of type int, not 'three'."),
        ("epochs: true", ": epochs has to be of type int, not True."),
        ("epochs: 1.5", ": epochs has to be of type int, not 1.5."),
        ("ema: much", ": ema has to be of type float, not 'much'."),
        ("compile: 1", ": compile has to be of type bool, not 1."),
        ("optim: 3", ": optim has to be a mapping of fields, not 3."),
        ("device_batch: many", ": device_batch has to be of type int, not 'many'."),
        ("optim: {decay: all}", ": optim: decay has to be one of 'paper', 'upstream', 'upstream-2021', 'no-1d', not"),
        ("data: {channels: 2}", ": data: channels has to be one of 1, 3, not 2."),
        ("data: {mean: 0.5}", ": data: mean has to be a list, not 0.5."),
        ("data: {mean: [a]}", ": data: mean[0] has to be of type float, not 'a'."),
        ("data: {augment: {crop_scale: [1]}}", ": data: augment: crop_scale has to be a list of 2, not [1]."),
        ("- epochs", " has to be a mapping of fields, not ['epochs']."),
        ("", " has to be a mapping of fields, not None."),
        ("epochs: [3", " is not YAML: "),
        ("epochs: 0", "Training needs at least 1 epoch"),
        ("1: 2", "has no field 1: there are"),
    ],
)
def test_invalid_files_are_rejected_in_one_sentence(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_config(tmp_path / "mine.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere.yaml' cannot be read: No such file or directory\.$"):
        read_config(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"bytes.yaml' cannot be read: "):
        read_config(tmp_path / "bytes.yaml")


def test_differences_by_dotted_name():
    other = replace(CONFIG, epochs=9, data=replace(CONFIG.data, augment=replace(CONFIG.data.augment, flip=0.25)))
    assert differences(CONFIG, other) == {"epochs": (2, 9), "data.augment.flip": (0.5, 0.25)}


def test_unknown_recipe():
    with pytest.raises(UsageError, match="'simple': choose one of paper-simple, paper-heavy, plus"):
        recipe_of("simple")


@pytest.mark.parametrize(
    "invalid",
    [
        {"lr": 0},
        {"momentum": 1},
        {"weight_decay": -1},
        {"warmup_epochs": -1},
        {"nesterov": True, "momentum": 0.0},
        {"clip": 0.0},
        {"lr_batch": 0},
        {"norm_bias_lr": 0.0},
        {"head_lr": 0.0},
        {"schedule": "step"},
    ],
)
def test_optim_config_rejects_invalid_values(invalid):
    with pytest.raises(UsageError):
        OptimConfig(**invalid)


@pytest.mark.parametrize(
    "invalid",
    [
        {"epochs": 0},
        {"threads": 0},
        {"batch_size": 1},
        {"label_smoothing": 1.0},
        {"auxiliary_weight": -0.1},
        {"mixup": -0.1},
        {"cutmix": -1.0},
        {"ema": 1.0},
        {"whiten_stem": True, "init": "trained.safetensors"},
        {"progressive": ((0.0, 0.5),)},
        {"progressive": ((0.5, 0.0),)},
        {"progressive": ((0.5, 24.0),)},
        {"progressive": ((0.5, 0.5), (0.4, 0.75))},
        {"progressive": ((0.4, 0.75), (0.5, 0.5))},
        {"progressive": ((0.5, 0.5), (1.5, 0.75))},
        {"progressive": ((0.5, 0.5),), "data": DataConfig("masks:street")},
        {"device_batch": 0},
        {"devices": 0},
        {"nodes": 0},
        {"save_steps": -1},
        {"expand": True},
        {"epochs": 3, "optim": OptimConfig(warmup_epochs=3)},
        {"data": DataConfig("masks:street"), "batch_size": 0},
        {"data": DataConfig("masks:street"), "mixup": 0.2},
    ],
)
def test_train_config_rejects_invalid_values(invalid):
    with pytest.raises(UsageError):
        TrainConfig(**({"epochs": 5, "batch_size": 8} | invalid))


def test_images_with_masks_train_one_at_a_time():
    assert TrainConfig(data=DataConfig("cityscapes:street"), batch_size=1).batch_size == 1


def test_quickstart_takes_a_seed():
    assert quickstart(seed=3).seed == 3
    assert quickstart() == quickstart(seed=0)


def test_a_file_cannot_allow_commands(tmp_path):
    """Config files may be untrusted, and webdataset:pipe: runs a shell command."""
    path = tmp_path / "config.yaml"
    path.write_text("data: {uri: 'webdataset:pipe:touch effect', allow_commands: true}")
    with pytest.raises(UsageError, match=r"only you can, with --data\.allow-commands"):
        read_config(path)
    config = replace(recipe_of("cifar"), data=DataConfig("webdataset:pipe:cat x.tar", allow_commands=True))
    write_config(path, config, overwrite=True)
    assert read_config(path) == replace(config, data=DataConfig("webdataset:pipe:cat x.tar"))
