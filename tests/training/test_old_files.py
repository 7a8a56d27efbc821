"""Files written by version 0.1.0, literally: they can be read, and new ones have the same keys."""

import csv
import gzip
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

import repvgg.training
from repvgg.data import AffineJitter, Augment, DataConfig
from repvgg.models import ModelSpec, Stage
from repvgg.training import EpochRecord, OptimConfig, TrainConfig, fit, read_config, run, to_yaml
from repvgg.training.checkpoint import RunPosition, read_position
from tests.training.helpers import CONFIG, opened, tiny

CONFIG_YAML = """\
model: repvgg_t1
recipe: mine
epochs: 7
batch_size: 48
device_batch: 12
data:
  uri: imagefolder:/data/cats
  val: imagefolder:/data/cats-val
  train_size: 96
  test_size: 128
  crop_fraction: 0.9
  interpolation: bicubic
  channels: 1
  mean:
  - 0.5
  std:
  - 0.25
  augment:
    crop: random-resized
    crop_padding: 2
    crop_scale:
    - 0.1
    - 0.9
    crop_ratio:
    - 0.5
    - 2.0
    flip: 0.5
    policy: randaugment
    randaugment_ops: 3
    randaugment_magnitude: 7
    erase: 0.1
    erase_size: 0.3
    jitter:
      degrees: 10.0
      translate: 0.08
      scale: 0.1
  workers: 4
  on_bad: skip
  cache: none
optim:
  lr: 0.2
  lr_batch: 128
  momentum: 0.8
  nesterov: true
  weight_decay: 0.0005
  decay: upstream-2021
  custom_l2: true
  norm_bias_lr: 16.0
  warmup_epochs: 1.5
  clip: 1.0
label_smoothing: 0.1
mixup: 0.2
cutmix: 1.0
auxiliary_weight: 0.2
ema: 0.99
init: runs/a/plain.safetensors
expand: true
precision: bf16
channels_last: true
compile: true
sync_bn: true
dry_run: false
save_steps: 100
seed: 3
threads: 2
accelerator: cpu
devices: 2
nodes: 1
"""

CONFIG_VALUE = TrainConfig(
    model="repvgg_t1",
    recipe="mine",
    epochs=7,
    batch_size=48,
    device_batch=12,
    data=DataConfig(
        uri="imagefolder:/data/cats",
        val="imagefolder:/data/cats-val",
        train_size=96,
        test_size=128,
        crop_fraction=0.9,
        interpolation="bicubic",
        channels=1,
        mean=(0.5,),
        std=(0.25,),
        augment=Augment(
            crop="random-resized",
            crop_padding=2,
            crop_scale=(0.1, 0.9),
            crop_ratio=(0.5, 2.0),
            flip=0.5,
            policy="randaugment",
            randaugment_ops=3,
            randaugment_magnitude=7,
            erase=0.1,
            erase_size=0.3,
            jitter=AffineJitter(degrees=10.0, translate=0.08, scale=0.1),
        ),
        workers=4,
        on_bad="skip",
        cache="none",
    ),
    optim=OptimConfig(
        lr=0.2,
        lr_batch=128,
        momentum=0.8,
        nesterov=True,
        weight_decay=5e-4,
        decay="upstream-2021",
        custom_l2=True,
        norm_bias_lr=16.0,
        warmup_epochs=1.5,
        clip=1.0,
    ),
    label_smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
    auxiliary_weight=0.2,
    ema=0.99,
    init="runs/a/plain.safetensors",
    expand=True,
    precision="bf16",
    channels_last=True,
    compile=True,
    sync_bn=True,
    dry_run=False,
    save_steps=100,
    seed=3,
    threads=2,
    accelerator="cpu",
    devices=2,
    nodes=1,
)

# Without "config", whose content is that of config.yaml.
REPORT_JSON = """\
{
 "created": "2026-11-30T10:41:14+00:00",
 "command": "repvgg train --config config.yaml",
 "classes": [
  "0",
  "1",
  "2",
  "3"
 ],
 "train_form": {
  "top1": 1.0,
  "top5": 1.0,
  "macro_accuracy": 1.0,
  "correct": 19,
  "images": 19,
  "confusion": [
   [
    5,
    0,
    0,
    0
   ],
   [
    0,
    5,
    0,
    0
   ],
   [
    0,
    0,
    5,
    0
   ],
   [
    0,
    0,
    0,
    4
   ]
  ]
 },
 "plain_form": {
  "top1": 1.0,
  "top5": 1.0,
  "macro_accuracy": 1.0,
  "correct": 19,
  "images": 19,
  "confusion": [
   [
    5,
    0,
    0,
    0
   ],
   [
    0,
    5,
    0,
    0
   ],
   [
    0,
    0,
    5,
    0
   ],
   [
    0,
    0,
    0,
    4
   ]
  ]
 },
 "seconds": 6.570280629000081,
 "history": [
  {
   "epoch": 1,
   "loss": 1.3021024465560913,
   "held_out_accuracy": 0.6842105388641357,
   "held_out_top5": 1.0,
   "lr": 0.037500000000000006,
   "seconds": 1.1606567899998481,
   "images_per_second": 86.88232588546381
  },
  {
   "epoch": 2,
   "loss": 0.8219950199127197,
   "held_out_accuracy": 1.0,
   "held_out_top5": 1.0,
   "lr": 0.0,
   "seconds": 1.688088031999996,
   "images_per_second": 58.515613156024735
  }
 ],
 "skipped_images": 0
}
"""

LOG_CSV = """\
epoch,loss,held_out_accuracy,held_out_top5,lr,seconds,images_per_second
1,1.3021024465560913,0.6842105388641357,1.0,0.037500000000000006,1.1606567899998481,86.88232588546381
2,0.8219950199127197,1.0,1.0,0.0,1.688088031999996,58.515613156024735
"""


@pytest.mark.parametrize("name", ["Layout", "Trial", "layout_of", "try_out", "without_branches"])
def test_former_names(name):
    new = getattr(repvgg.training, name)
    assert new.__name__ in repvgg.training.__all__
    assert getattr(repvgg.training, new.__name__) is new


# Settings that files of that time do not have; "mask" and "qat" are mappings.
NEW_SETTINGS = (
    r"(?m)^    mask:\n(?:      .*\n)+|^qat:\n(?:  .*\n)+|"
    r"^ *(?:allow_commands|ignore_index|schedule|head_lr|alternate_flip|progressive|whiten_stem): .*\n"
)


def test_config_with_every_field(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG_YAML)
    assert read_config(tmp_path / "config.yaml") == CONFIG_VALUE
    assert re.sub(NEW_SETTINGS, "", to_yaml(CONFIG_VALUE)) == CONFIG_YAML


def keys(value):
    """The keys of nested mappings; a list has those of its first item."""
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return {name: keys(item) for name, item in value.items()} if isinstance(value, dict) else None


def restricted(new, old):
    """The part of ``new``, nested keys, that ``old`` has too."""
    if isinstance(old, list):
        return [restricted(new[0], old[0])] if old else []
    return {name: restricted(new[name], old[name]) for name in old if name in new} if isinstance(old, dict) else new


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(replace(CONFIG, epochs=1, ema=0.9, optim=replace(CONFIG.optim, warmup_epochs=0.0)), folder)
    return folder


def test_report_and_log(finished):
    old, new = json.loads(REPORT_JSON), json.loads((finished / "report.json").read_text())
    assert keys(new.pop("config")) == keys(yaml.safe_load((finished / "config.yaml").read_text()))
    assert restricted(keys(new), keys(old)) == keys(old)  # later versions add entries
    records = [EpochRecord(**record) for record in old["history"]]
    rows = list(csv.DictReader(LOG_CSV.splitlines()))
    assert [EpochRecord(int(row.pop("epoch")), *map(float, row.values())) for row in rows] == records
    header = LOG_CSV.splitlines()[0]
    names = [field.name for field in fields(EpochRecord)]
    assert (finished / "log.csv").read_text().splitlines()[0] == ",".join(names)
    assert header.split(",") == names[: header.count(",") + 1]  # later columns come last


def test_names_of_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "last.ckpt", "train.safetensors", "plain.safetensors", "best.safetensors"),
        *("report.json", "log.csv", "curve.png", "tensorboard"),
    }


def test_an_interrupted_run_can_be_resumed(tmp_path):
    """It had taken 9 of 12 steps; resumed, it ends like a new run, up to the rounding of another machine."""
    config, spec = replace(CONFIG, ema=0.9, save_steps=1), ModelSpec("tiny", Stage(1, 4, stride=1), (Stage(1, 4),))
    path = tmp_path / "last.ckpt"
    path.write_bytes(gzip.decompress(Path(__file__).with_name("last-0.1.0.ckpt.gz").read_bytes()))
    old = torch.load(path, weights_only=True)
    assert read_position(path) == RunPosition(epoch=1, batches=3, accumulation=1)
    resumed, new = tiny(spec=spec), tiny(spec=spec)
    result = fit(resumed, opened(config), config, folder=tmp_path, resume=True, progress=False)
    expected = fit(new, opened(config), config, progress=False)
    assert_close(dict(resumed.state_dict()), dict(new.state_dict()), rtol=1e-3, atol=1e-5)
    assert [record.loss for record in result.history] == pytest.approx([r.loss for r in expected.history], rel=1e-4)
    assert result.history[0].loss == old["callbacks"]["History"]["records"][0]["loss"]
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == old.keys()
    assert saved["callbacks"].keys() == old["callbacks"].keys()
    assert saved["state_dict"].keys() == old["state_dict"].keys()
