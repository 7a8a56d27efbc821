"""Train small networks in every layout and dtype, in a separate process that may crash.

oneDNN's weight gradient of a strided 1x1 convolution with few channels writes past its workspace in channels_last
(uxlfoundation/oneDNN#6035); timm's RepVGG crashes within a few steps at 160x160. Gradients of the first step are
compared with those in float64, which detects wrong values where nothing crashes. The float64 network uses the ReLU
masks of the tested one: a value that rounds to the other side of zero changes the gradient by some thousandths, with
PyTorch's own functions as well (0.001 to 0.009 for repvgg_t0 and repvgg_t1 in float32 at 160x160).

    python strided_1x1_grad_script.py MODEL PIXELS STEPS
"""

import copy
import sys
from contextlib import contextmanager

import torch
from torch import nn

from repvgg.blocks import RepVGGBlock, training_kernels
from repvgg.models import ModelSpec, SqueezeExciteSpec, Stage, create_model

SPECS = {
    "gated": ModelSpec(
        "gated",
        Stage(1, 48),
        (Stage(1, 48), Stage(2, 8), Stage(1, 24)),
        groups=2,
        squeeze_excite=SqueezeExciteSpec("before_relu", 4),
        auxiliary=(1,),
    ),
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
ERROR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.3}  # relative, of the gradients of all kernels


class FixedMask(nn.Module):
    """Replaces a ReLU by the mask of another run."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def blocks_of(model):
    return {name: part for name, part in model.named_modules() if isinstance(part, RepVGGBlock)}


@contextmanager
def relu_masks(model):
    """Collect the mask of each block's ReLU by name while the model runs; gates are positive and change no sign."""
    found = {}
    hooks = [
        block.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.detach() > 0}))
        for name, block in blocks_of(model).items()
    ]
    yield found
    for hook in hooks:
        hook.remove()


def exact_gradients(template, images, found):
    """Return the float64 gradients with the ReLU masks of another run."""
    model = copy.deepcopy(template).double()
    for name, block in blocks_of(model).items():
        if isinstance(block.act, nn.ReLU):
            block.act = FixedMask(found[name])
        else:
            (relu,) = (child for child, part in block.act.named_children() if isinstance(part, nn.ReLU))
            setattr(block.act, relu, FixedMask(found[name]))
    with training_kernels("eager"):
        return gradients(model, images)


def gradients(model, x, dtype=None):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(x)
    logits = (out, *()) if isinstance(out, torch.Tensor) else (out.logits, *out.auxiliary)
    model.zero_grad()
    sum(value.double().square().sum() for value in logits).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.dim() == 4])


def main(name, pixels, steps):
    torch.manual_seed(0)
    template = create_model(SPECS.get(name, name), num_classes=7).train()
    images = torch.randn(2, 3, pixels, pixels, dtype=torch.float64) + 1
    for layout in LAYOUTS:
        for dtype, limit in ERROR.items():
            stored = torch.float64 if dtype == torch.float64 else torch.float32
            model = copy.deepcopy(template).to(stored, memory_format=layout)
            x = images.to(stored).contiguous(memory_format=layout)
            with relu_masks(model) as found:
                first = gradients(model, x, dtype)
            exact = exact_gradients(template, images, found)
            error = float((first - exact).norm() / exact.norm())
            assert error < limit, f"{name}, {dtype}, {layout}: the gradients are off by {error:.2g}"
            optimizer = torch.optim.SGD(model.parameters(), 1e-4)
            for _ in range(steps):
                optimizer.step()
                assert gradients(model, x, dtype).isfinite().all()
            print(name, dtype, layout, f"{error:.2g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
