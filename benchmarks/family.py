"""Every RepVGG on photographs: do train form, plain form, ONNX file and engine predict the same classes?

    python benchmarks/family.py --images imagenet-sample256/ --photographs 500
    python benchmarks/family.py --images imagenet-sample256/ --photographs 24 --models repvgg_b3 repvgg_d2se

No trained weights are needed. A network gets random weights by ``--seed``, and batch norms with random scales and
shifts; their statistics become those of 16 photographs, from two batches in training mode, and the bias of the
classifier cancels the mean logit of these. So the classes vary from one photograph to the next.

The forms are: the train form in PyTorch; the plain form, ``reparameterize(train)``, in PyTorch; its ONNX file in ONNX
Runtime; and the plain form in this library's engine; all in float32. Where they do not all predict the same class,
``verify`` runs the train form in float64 on the photograph, and the difference is a tie if three things hold: the error
of each form is within verify's tolerance (four times the rounding error of the train form itself, or the floor of
float32); the two classes are closer in float64 than twice that tolerance; and both forms agree on the class in float64,
the plain one converted in float64. Anything else fails the command.

The photographs are taken in a random order that depends on ``--seed`` alone, so the first of them are a sample of all.
``--out`` has one entry for each network and is written after each batch: the same command continues after an
interruption, and a larger ``--photographs`` adds to what is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import repvgg
import repvgg.engine
from repvgg._files import write_text
from repvgg.data import DataConfig, list_images, read_images
from repvgg.deploy import OnnxRunner, export_onnx
from repvgg.measure import environment
from repvgg.models import ARCHITECTURES, create_model, list_models
from repvgg.verify import Evidence, verify

Run = Callable[[Tensor], Tensor]
FORMS = ("train", "plain", "onnx", "engine")
BATCH = 4
# Few photographs: the largest networks take seconds for each, and the values of the statistics hardly matter.
CALIBRATION_BATCHES, CALIBRATION_BATCH = 2, 8


def train_form(name: str, seed: int, calibration: Sequence[Tensor]) -> nn.Module:
    """Return a network whose batch norms have the statistics of photographs, in eval mode."""
    torch.manual_seed(seed)
    model = create_model(name)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
        norm.reset_running_stats()
        norm.momentum = None  # the mean over the batches
    with torch.no_grad():
        model.train()
        # Of batch statistics, not of their means: near enough for a bias, and no second pass.
        model.head.bias -= torch.cat([model(images) for images in calibration]).mean(0)
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def forms_of(model: nn.Module, shape: tuple[int, int, int], folder: Path) -> dict[str, Run]:
    """Return the network as each runtime computes it."""
    plain, _ = repvgg.reparameterize(model)
    path = export_onnx(plain, folder / "plain.onnx", shape, overwrite=True).path
    threads = torch.get_num_threads()
    compiled = repvgg.engine.compile(plain, (BATCH, *shape), threads)
    return dict(zip(FORMS, (model, plain, OnnxRunner(path, threads), compiled), strict=True))


def difference(model: nn.Module, forms: dict[str, Run], image: Tensor, photograph: str) -> dict[str, Any]:
    """Describe a photograph on which the forms disagree, and say whether it is a tie."""
    evidences: dict[str, Evidence] = {name: verify(model, run, [image]) for name, run in forms.items()}
    with torch.inference_mode():
        train64 = copy.deepcopy(model).double()
        logits = train64(image.double())[0]
        plain64, _ = repvgg.reparameterize(train64)
        merged = plain64(image.double())[0]
    predicted = {name: int(run(image)[0].argmax()) for name, run in forms.items()}
    best = int(logits.argmax())
    scale = float(logits.abs().max())
    # Each form chose a class whose exact logit is below the best one by this much.
    margin = max(float(logits[best] - logits[one]) for one in predicted.values()) / scale
    tolerance = max(evidence.tolerance for evidence in evidences.values())
    passed = all(evidence.passed for evidence in evidences.values())
    return {
        "photograph": photograph,
        "predicted": predicted,
        "float64": best,
        "float64, plain form": int(merged.argmax()),
        "margin": margin,
        "errors": {name: evidence.relative for name, evidence in evidences.items()},
        "tolerance": tolerance,
        "tie": passed and margin <= 2 * tolerance and int(merged.argmax()) == best,
    }


def compare(entry: dict[str, Any], model: nn.Module, forms: dict[str, Run], images: Tensor, names: list[str]) -> None:
    """Add a batch of photographs to the entry of a network."""
    with torch.inference_mode():
        logits = {name: run(images) for name, run in forms.items()}
    classes = torch.stack([logits[name].argmax(1) for name in FORMS])
    same = (classes == classes[0]).all(0)
    for index in (~same).nonzero().flatten().tolist():
        found = difference(model, forms, images[index : index + 1], names[index])
        entry["differences"].append(found)
    scale = float(logits["train"].abs().max())
    for name in FORMS[1:]:
        error = float((logits[name] - logits["train"]).abs().max()) / scale
        entry["largest deviation"][name] = max(entry["largest deviation"].get(name, 0.0), error)
    entry["classes"] = sorted({*entry["classes"], *classes[0].tolist()})
    entry["identical"] += int(same.sum())
    entry["photographs"] += len(names)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--photographs", type=int, default=500, help="for each network")
    parser.add_argument("--models", nargs="+", default=list_models(), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/family.json"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    files = list_images([arguments.images])
    random.Random(arguments.seed).shuffle(files)
    wanted = min(arguments.photographs, len(files))
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"networks": {}}
    if results.get("seed", arguments.seed) != arguments.seed:
        raise SystemExit(f"{arguments.out} is of the seed {results['seed']}: give that --seed, or another --out.")
    results |= {"seed": arguments.seed, "environment": environment()}
    for name in arguments.models:
        row = run_row(name, files, wanted, results, arguments)
        print(summary(name, row), flush=True)
    rows = results["networks"]
    unexplained = [name for name in arguments.models for one in rows[name]["differences"] if not one["tie"]]
    if unexplained:
        raise SystemExit(f"Predictions differ and are no ties: {', '.join(sorted(set(unexplained)))}.")


def run_row(
    name: str, files: Sequence[Path], wanted: int, results: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Bring the entry of a network to ``wanted`` photographs, writing the file after each batch."""
    calibrated = CALIBRATION_BATCHES * CALIBRATION_BATCH
    counts = {"photographs": 0, "identical": 0, "classes": [], "largest deviation": {}, "differences": []}
    entry = results["networks"].setdefault(name, {"calibrated on": calibrated, **counts})
    if entry["photographs"] >= wanted:
        return entry
    if entry.get("calibrated on") != calibrated:
        raise SystemExit(f"{name} in {arguments.out} is another network: remove its line, or give another --out.")
    size = ARCHITECTURES[name].input_size
    config = DataConfig()
    calibration = [
        read_images(files[start : start + CALIBRATION_BATCH], config, size, 3)
        for start in range(0, CALIBRATION_BATCHES * CALIBRATION_BATCH, CALIBRATION_BATCH)
    ]
    model = train_form(name, arguments.seed, calibration)
    with tempfile.TemporaryDirectory() as folder:
        forms = forms_of(model, (3, size, size), Path(folder))
        while entry["photographs"] < wanted:
            begin = entry["photographs"]
            part = files[begin : min(begin + BATCH, wanted)]
            compare(entry, model, forms, read_images(part, config, size, 3), [file.name for file in part])
            write_text(arguments.out, as_text(results), overwrite=True)
    return entry


def as_text(results: dict[str, Any]) -> str:
    """Return the results as JSON with a line for each network."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in results["networks"].items())
    others = {key: value for key, value in results.items() if key != "networks"}
    return f'{json.dumps(others)[:-1]}, "networks": {{\n{rows}\n}}}}\n'


def summary(name: str, entry: dict[str, Any]) -> str:
    ties = sum(one["tie"] for one in entry["differences"])
    deviation = ", ".join(f"{form} {value:.1e}" for form, value in entry["largest deviation"].items())
    return (
        f"{name}: {entry['identical']} of {entry['photographs']} identical in four forms, "
        f"{ties} ties, {len(entry['differences']) - ties} others; {len(entry['classes'])} classes; "
        f"deviation {deviation}"
    )


if __name__ == "__main__":
    main()
