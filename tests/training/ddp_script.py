"""The work of one process in the tests of data parallelism.

``cli_server.py`` calls :func:`both`; under torchrun, ``ddp_script.py EVENT ARGUMENTS`` runs ``repvgg`` with ARGUMENTS.
"""

import os
import signal
import sys
import time
from dataclasses import replace

import torch
from torch import nn

import repvgg.training.task as tasks
from repvgg.cli import main
from repvgg.data import DataConfig
from repvgg.training import OptimConfig, fit
from repvgg.training.distributed import synchronized_batch_norm
from repvgg.training.segmentation_task import _Confusion
from tests.training.helpers import CONFIG, opened, tiny

# 85 images give 17 validation images: rank 0 has 8 of them in one batch, rank 1 has 9 in two.
PLAIN = replace(
    CONFIG,
    epochs=10,
    batch_size=16,
    data=DataConfig(uri="fake:85x4", train_size=8),
    optim=OptimConfig(lr=0.05, lr_batch=None, weight_decay=1e-3),
    sync_bn=True,
)


def rank():
    return int(os.environ.get("RANK", "0"))


def observed_fit():
    """Train, and return the global mean loss of every step, the final weights and the records."""
    losses = []
    original = tasks.ClassificationTask.training_step

    def step(self, batch, index):
        loss = original(self, batch, index)
        losses.append(loss.detach().clone())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(losses[-1])
            losses[-1] /= torch.distributed.get_world_size()
        return loss

    tasks.ClassificationTask.training_step = step
    try:
        model = tiny()
        result = fit(model, opened(PLAIN), PLAIN, progress=False)
    finally:
        tasks.ClassificationTask.training_step = original
    history = [(record.loss, record.held_out_accuracy) for record in result.history]
    return {"losses": torch.stack(losses), "weights": model.state_dict(), "history": history}


def norms():
    """Return a float64 net with batch norms of all kinds, the global batch of 6 images, and its targets."""
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3, momentum=0.3)
    net = nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.Conv2d(3, 3, 1),
        shared,
        nn.Conv2d(3, 3, 3),
        shared,
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-1, 1)
    return net.double(), torch.randn(6, 3, 5, 4).double(), torch.randn(6, 3, 3, 2).double()


def step(net, x, target):
    """Return outputs, gradients of a mean over the batch, and running statistics, after two forward passes."""
    x = x.clone().requires_grad_()
    net(x.detach() + 1)
    out = net(x)
    (out * target).mean().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {"out": out.detach(), "input": x.grad, "gradients": gradients, "buffers": dict(net.named_buffers())}


def synchronized_step():
    """Return the same for this rank's images; parameter gradients are averaged over both ranks, as DDP does."""
    net, x, target = norms()
    images = slice(0, 2) if rank() == 0 else slice(2, 6)  # different numbers of images
    with synchronized_batch_norm(net):
        found = step(net, x[images], target[images] * len(x[images]) / 6 * 2)
    for gradient in found["gradients"].values():
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return found


def confusion():
    """Return the confusion matrix over all ranks; each of them has seen one image of its own."""
    matrix = _Confusion(2, ignore_index=255)
    matrix.update(torch.tensor([[rank(), 1]]), torch.tensor([[0, 255 * rank()]]))
    return matrix.compute()


def both(out):
    found = observed_fit()  # Lightning initializes the process group
    torch.save({"fit": found, "norms": synchronized_step(), "confusion": confusion()}, f"{out}.{rank()}")


def command(event, *arguments):
    """Run ``repvgg`` with ``arguments``; in the 4th training step, ``event`` happens on one rank."""
    left, original = 4, tasks.ClassificationTask.training_step

    def step(self, batch, index):
        nonlocal left
        left -= 1
        if left == 0 and rank() == 1:
            sys.stderr.write(f"fails at {time.time()}\n")
            sys.stderr.flush()
        if left == 0 and event == "raise" and rank() == 1:
            raise RuntimeError("this rank failed")
        if left == 0 and event == "exit" and rank() == 1:
            os._exit(7)
        if left == 0 and event == "terminate" and rank() == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        return original(self, batch, index)

    tasks.ClassificationTask.training_step = step
    sys.exit(main(list(arguments)))


if __name__ == "__main__":
    command(*sys.argv[1:])
