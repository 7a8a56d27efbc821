"""Train a classifier for the backbone of a segmentation network, with one loop for RepVGG and ResNet.

    python -m benchmarks.pretrain_backbone repvgg_a0|resnet18 --data imagefolder:cifar10 --out a0.safetensors
                                           [--size 32 --epochs 1 --batch 128 --lr 0.05 --seed 0 --threads 2]

``repvgg train`` trains RepVGG alone. To compare backbones, both are trained here on the same batches, with SGD
(Nesterov momentum, weight decay 5e-4) and a one-cycle schedule, in bf16. The file is a checkpoint of ours, or has the
names of torchvision: what ``repvgg train pspnet_… --init FILE`` takes.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from repvgg.data import Augment, DataConfig, ImageData, open_image_data
from repvgg.models import SPECS, Model, create_baseline, create_model, describe_model, save
from repvgg.training import seeded


def accuracy(model: nn.Module, data: ImageData) -> float:
    model.eval()
    right = count = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for images, labels in data.val_batches(256):
            right += int((model(data.prepare(images)).argmax(1) == labels).sum())
            count += len(labels)
    return right / count


def train(model: nn.Module, data: ImageData, arguments: argparse.Namespace) -> None:
    model.train().to(memory_format=torch.channels_last)
    loader = data.train_batches(arguments.batch)
    optimizer = torch.optim.SGD(model.parameters(), arguments.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = arguments.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps, pct_start=0.2)
    epochs = (loader for epoch in range(arguments.epochs) if loader.set_epoch(epoch) is None)
    start = time.perf_counter()
    for step, (images, labels) in enumerate(itertools.chain.from_iterable(epochs)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(data.prepare(images).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="URI of labelled images")
    parser.add_argument("--out", required=True, type=Path)
    for name, default in {"size": 32, "epochs": 1, "batch": 128, "seed": 0, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=0.05)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    augment = Augment(crop="pad", crop_padding=arguments.size // 8, flip=0.5)
    size = arguments.size
    data = open_image_data(
        DataConfig(uri=arguments.data, train_size=size, test_size=size, augment=augment, workers=0), seed=arguments.seed
    )
    build = create_model if arguments.model in SPECS else create_baseline
    with seeded("model", arguments.seed):
        model = build(arguments.model, len(data.classes))
    train(model, data, arguments)
    print(f"{arguments.model}: {accuracy(model, data):.2%} of the validation images")
    if isinstance(model, Model):
        save(arguments.out, model, describe_model(model, "train"))
    else:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, arguments.out)


if __name__ == "__main__":
    main()
