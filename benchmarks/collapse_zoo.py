"""Collapse models of timm and torchvision, compared with timm's own function and torch's.

    python benchmarks/collapse_zoo.py [--models PATTERN …] [--json OUT] [--markdown] [--threads 1]

Each model has random weights, batch norms with statistics of images (seeded) and float64; it is collapsed by
``repvgg.reparameterize``, by timm's ``reparameterize_model`` (timm models) and by torch's
``torch.fx.experimental.optimization.fuse`` if that can trace it. A cell shows parameters, multiply-adds for one
image, batch norms that are left (modules or executed ones, whichever are more: torch's result may call functions), the
largest difference relative to the largest output, and seconds (one run). Required: our error is at most 1e-10, and our
model has no more parameters, multiply-adds or batch norms than the original, and than a peer that errs by less than
1e-4 (timm's rounds some weights to float32). Exit code 1 if that does not hold for a model, or a model failed. A
failing peer is not an error. Needs the extra ``timm``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from repvgg import reparameterize
from repvgg.measure import Walk, environment, walk

TOLERANCE = 1e-10
PEERS_TOLERANCE = 1e-4
SIZE = (96, 128)
TIMM = (
    "repvgg_*", "mobileone_*", "fastvit_*", "repvit_*", "repghostnet_*", "levit*", "efficientformer*",
    "tiny_vit_5m_224", "mobilenetv3_small_100", "efficientnet_b0", "resnet18", "regnetx_002", "convnext_atto",
)  # fmt: skip
TORCHVISION = (
    "resnet50", "vgg11_bn", "googlenet", "inception_v3", "densenet121", "mnasnet1_0", "shufflenet_v2_x1_0",
    "mobilenet_v2",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A model: how to create it, and the size of its input image."""

    name: str
    maker: str
    size: tuple[int, int] = SIZE
    img_size: bool = False  # whether the size is passed on creation, because attention is built for one size

    @property
    def label(self) -> str:
        """The size of the image, and whether the model was created for it."""
        fixed = " (img_size=)" if self.img_size else " (the only one)" if self.size != SIZE else ""
        return f"{self.size[0]}x{self.size[1]}{fixed}"

    def make(self) -> nn.Module:
        """Return the model with trained-looking random weights, in float64 and eval mode."""
        torch.manual_seed(0)
        if self.maker == "timm":
            import timm

            options: dict[str, Any] = {"img_size": self.size} if self.img_size else {}
            model: nn.Module = timm.create_model(self.name, **options)
        else:
            more = {"init_weights": False} if self.name in ("googlenet", "inception_v3") else {}
            model = torchvision.models.get_model(self.name, weights=None, **more)
        return trained(model.double().eval(), self.size)


@dataclass(frozen=True)
class Outcome:
    """The result of one variant on a model.

    Attributes:
        params: number of parameters.
        macs: multiply-adds for one image.
        norms: number of batch norms that are left.
        error: largest difference from the original model, relative to its largest output.
        seconds: duration.
        failure: why there is no result; all numbers are then 0.
    """

    params: int = 0
    macs: int = 0
    norms: int = 0
    error: float = 0.0
    seconds: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        return self.failure or f"{self.params / 1e6:.3f}M {self.macs / 1e9:.4f}G {self.norms} BN"

    @property
    def cell(self) -> str:
        """The same with error and seconds, for everything but the original model."""
        return self.failure or f"{self}, {self.error:.0e}, {self.seconds:.1f}s"

    @property
    def comparable(self) -> bool:
        """Whether it computes approximately what the model computes."""
        return not self.failure and self.error <= PEERS_TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """All variants of one model, by name; "original" is the model itself."""

    entry: Entry
    outcomes: dict[str, Outcome]
    failure: str = ""

    @property
    def result(self) -> str:
        """The requirements that do not hold, or "holds"."""
        return self.failure or "; ".join(self._broken()) or "holds"

    @property
    def holds(self) -> bool:
        """Whether all requirements hold."""
        return self.result == "holds"

    def _broken(self) -> Iterator[str]:
        ours = self.outcomes["ours"]
        if ours.failure:
            yield ours.failure
            return
        if not ours.error <= TOLERANCE:
            yield f"error {ours.error:.1e}"
        for name, peer in self.outcomes.items():
            for field in ("params", "macs", "norms") if name != "ours" and peer.comparable else ():
                mine, theirs = getattr(ours, field), getattr(peer, field)
                if mine > theirs:
                    yield f"more {field} than {name} ({mine:,} > {theirs:,})"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data, for JSON."""
        return {**asdict(self), "verdict": self.result, "holds": self.holds}


def trained(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Set trained-looking factors and near-true statistics, so that every fold matters and activations stay bounded."""
    generator = torch.Generator().manual_seed(0)
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.running_var is not None]
    for part in norms:
        part.train().momentum = 1.0
        if part.affine:
            part.weight.data.uniform_(0.5, 1.0, generator=generator)
            part.bias.data.normal_(0, 0.1, generator=generator)
    for parameter in model.parameters():  # scales of layers that start at 1e-5 or 0.01
        if parameter.numel() > 1 and 0 < parameter.data.min() == parameter.data.max() <= 0.01:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():
        model(torch.randn(4, 3, *size, generator=generator, dtype=torch.float64))
    for part in norms:
        part.eval().momentum = 0.1
        assert part.running_var is not None
        part.running_var *= torch.rand(part.num_features, generator=generator) * 0.5 + 1.0
    return model


def collapsed_by_repvgg(model: nn.Module, image: Tensor) -> nn.Module:
    return reparameterize(model, image)[0]


def collapsed_by_timm(model: nn.Module) -> nn.Module:
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model, inplace=False).double()  # some parts are float32


def fused_by_torch(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def variants(entry: Entry, image: Tensor) -> dict[str, Callable[[nn.Module], nn.Module]]:
    timms = {"timm": collapsed_by_timm} if entry.maker == "timm" else {}
    return {"ours": lambda model: collapsed_by_repvgg(model, image), **timms, "torch.fx": fused_by_torch}


def outputs_of(model: nn.Module, image: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [leaf for leaf in tree_leaves(model(image)) if isinstance(leaf, Tensor)]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest number; NaN where a number is."""
    if [y.shape for y in found] != [y.shape for y in expected]:
        return math.inf
    largest = torch.stack([y.abs().max() for y in expected]).max()
    return float(torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)]).max() / largest)


def batch_norms(model: nn.Module, done: Walk) -> int:
    """Return the number of batch norm modules of any class, or of executed batch norms if that is larger."""
    frozen = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
    modules = sum(isinstance(part, _BatchNorm) or type(part).__name__ in frozen for part in model.modules())
    return max(modules, sum("batch_norm" in op.name for op in done.ops))


def measured(model: nn.Module, image: Tensor, expected: Sequence[Tensor], seconds: float) -> Outcome:
    error = relative_error(outputs_of(model, image), expected)
    done = walk(model, image)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(params, done.macs, batch_norms(model, done), error, seconds)


def outcome(
    collapse: Callable[[nn.Module], nn.Module], model: nn.Module, image: Tensor, expected: list[Tensor]
) -> Outcome:
    """Run one variant on one model; its result is released on return."""
    start = time.perf_counter()
    try:
        collapsed = collapse(model)
        seconds = time.perf_counter() - start
        return measured(collapsed, image, expected, seconds)
    except Exception as error:
        cannot_trace = collapse is fused_by_torch and type(error).__name__ in ("TraceError", "TypeError")
        return Outcome(failure="cannot trace" if cannot_trace else one_line(error))


def compare(entry: Entry) -> Comparison:
    """Run all variants on one model; an error becomes part of the comparison."""
    try:
        model = entry.make()
        image = torch.randn(1, 3, *entry.size, dtype=torch.float64)
        expected = outputs_of(model, image)
        found = {"original": measured(model, image, expected, 0.0)}
        for name, collapse in variants(entry, image).items():
            found[name] = outcome(collapse, model, image, expected)
            gc.collect()
    except Exception as error:
        return Comparison(entry, {}, one_line(error))
    return Comparison(entry, found)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:80]}"


def entries() -> list[Entry]:
    import timm

    names = [name for pattern in TIMM for name in timm.list_models(pattern)]
    return [timm_entry(name) for name in names] + [Entry(name, "torchvision") for name in TORCHVISION]


def timm_entry(name: str) -> Entry:
    if fnmatch(name, "levit*") or fnmatch(name, "efficientformerv2_*"):
        return Entry(name, "timm", img_size=True)
    return Entry(name, "timm", size=(224, 224)) if fnmatch(name, "efficientformer_*") else Entry(name, "timm")


def table(comparisons: Sequence[Comparison], markdown: bool) -> str:
    """Format one line per model."""
    columns = ("original", "ours", "timm", "torch.fx")
    lines = [["model", "input", *columns, "result"]]
    for line in comparisons:
        first, *others = (line.outcomes.get(name, Outcome(failure="–")) for name in columns)
        lines.append([line.entry.name, line.entry.label, str(first), *(o.cell for o in others), line.result])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if markdown:
        lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in padded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="PATTERN", default=["*"], help="names, * and ? as in a shell")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers there")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--threads", type=int, default=1, help="more threads wait for each other on a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [entry for entry in entries() if any(fnmatch(entry.name, pattern) for pattern in arguments.models)]
    if not chosen:
        parser.error(f"no model is named {' or '.join(arguments.models)}")
    warnings.simplefilter("ignore")
    comparisons: list[Comparison] = []
    for index, entry in enumerate(chosen, 1):
        start = time.perf_counter()
        comparisons.append(compare(entry))
        gc.collect()
        took = f"{time.perf_counter() - start:.1f}s"
        print(f"{index}/{len(chosen)} {entry.name}: {comparisons[-1].result} ({took})", file=sys.stderr, flush=True)
    if arguments.json:
        written = {"environment": environment(), "rows": [line.to_dict() for line in comparisons]}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    print(table(comparisons, arguments.markdown))
    print(f"\n{sum(line.holds for line in comparisons)} of {len(comparisons)} hold")
    return 0 if all(line.holds for line in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
