"""What the tests of several processes run under torchrun: ``ddp_script.py WHAT ARGUMENTS``."""

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
from tests.training.helpers import CONFIG, opened, tiny

RANK = int(os.environ.get("RANK", "0"))
# 85 images leave 17 to judge by: one process has 8 of them in one batch, and the other 9 in two
PLAIN = replace(
    CONFIG,
    epochs=10,
    batch_size=16,
    data=DataConfig(uri="fake:85x4", train_size=8),
    optim=OptimConfig(lr=0.05, lr_batch=None, weight_decay=1e-3),
    sync_bn=True,
)


def watched_fit():
    """The global mean loss of every step, the weights that came out, and the records."""
    seen = []
    original = tasks.ClassificationTask.training_step

    def step(self, batch, index):
        loss = original(self, batch, index)
        seen.append(loss.detach().clone())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen[-1])
            seen[-1] /= torch.distributed.get_world_size()
        return loss

    tasks.ClassificationTask.training_step = step
    try:
        model = tiny()
        result = fit(model, opened(PLAIN), PLAIN, progress=False)
    finally:
        tasks.ClassificationTask.training_step = original
    history = [(record.loss, record.held_out_accuracy) for record in result.history]
    return {"losses": torch.stack(seen), "weights": model.state_dict(), "history": history}


def norms():
    """A net of batch norms of all kinds, float64, with the global batch of 6 images and its targets."""
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
    return trained_like_norms(net).double(), torch.randn(6, 3, 5, 4).double(), torch.randn(6, 3, 3, 2).double()


def trained_like_norms(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-1, 1)
    return net


def step(net, x, target):
    """Outputs, gradients of a mean over the batch, and statistics, after two passes."""
    x = x.clone().requires_grad_()
    net(x.detach() + 1)
    out = net(x)
    (out * target).mean().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return {"out": out.detach(), "input": x.grad, "gradients": gradients, "buffers": dict(net.named_buffers())}


def synchronized_step():
    """The same on the share of this process; gradients are averaged over all, as DDP does."""
    net, x, target = norms()
    share = slice(0, 2) if RANK == 0 else slice(2, 6)  # not the same number of images
    with synchronized_batch_norm(net):
        found = step(net, x[share], target[share] * len(x[share]) / 6 * 2)
    for gradient in found["gradients"].values():
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return found


def both(out):
    found = watched_fit()
    torch.save({"fit": found, "norms": synchronized_step()}, f"{out}.{RANK}")


def command(event, *arguments):
    """``repvgg`` with ``arguments``; in the 4th step something happens on one process."""
    left, original = 4, tasks.ClassificationTask.training_step

    def step(self, batch, index):
        nonlocal left
        left -= 1
        if left == 0 and RANK == 1:
            sys.stderr.write(f"falls at {time.time()}\n")
            sys.stderr.flush()
        if left == 0 and event == "raise" and RANK == 1:
            raise RuntimeError("this worker fell")
        if left == 0 and event == "exit" and RANK == 1:
            os._exit(7)
        if left == 0 and event == "terminate" and RANK == 0:
            os.kill(os.getppid(), signal.SIGTERM)
        return original(self, batch, index)

    tasks.ClassificationTask.training_step = step
    sys.exit(main(list(arguments)))


if __name__ == "__main__":
    {"both": both, "command": command}[sys.argv[1]](*sys.argv[2:])
