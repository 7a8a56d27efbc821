"""What an installation with few packages can do, and what it says about the others."""

import ast
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass

import pytest

import repvgg

PACKAGE = pathlib.Path(repvgg.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Where the module has another name than the distribution, or comes with another one.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "markupsafe": "jinja2"}

# Runs commands in one process in which only the packages of the core can be imported.
CORE_ONLY = """
import contextlib, importlib.machinery, io, json, sys
BLOCKED, COMMANDS = map(json.loads, sys.argv[1:])
class CoreFinder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):  # None, not an error: torch probes for packages with find_spec
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)
sys.meta_path[:] = [CoreFinder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
from repvgg.cli import main
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def packages_of(extra: str) -> set[str]:
    """The distributions that an extra installs, by itself and by the extras that it includes."""
    found = set()
    for requirement in EXTRAS[extra]:
        if included := re.fullmatch(r"repvgg\[(.*)\]", requirement):
            found |= set().union(*map(packages_of, included[1].split(",")))
        else:
            found.add(distribution(requirement))
    return found


CORE = {distribution(requirement) for requirement in PROJECT["dependencies"]}
BLOCKED = sorted(
    {"torchvision", "PIL", "lightning", "torchmetrics", "sklearn", "matplotlib", "onnx", "onnxscript", "onnxruntime"}
    | {
        "jinja2",
        "huggingface_hub",
        "llvmlite",
        "timm",
        "openvino",
        "tensorboard",
        "datasets",
        "webdataset",
        "scipy",
        "nncf",
    }
)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def run(folder: pathlib.Path, commands: list[list[str]]) -> list[Outcome]:
    arguments = [json.dumps(BLOCKED), json.dumps(commands)]
    command = [sys.executable, "-W", "ignore", "-c", CORE_ONLY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True, cwd=folder)
    return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]


def required() -> list[tuple[str, str, str | None]]:
    """(place, package, extra) of each call of ``require`` in the sources."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "require"
                and isinstance(node.args[0], ast.Constant)
            ):
                package, *extra = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
                calls.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", package, extra[0] if extra else None))
    return calls


def test_every_extra_that_is_named_installs_the_package():
    calls = required()
    assert len(calls) > 10
    for place, package, extra in calls:
        top = package.partition(".")[0]
        wanted = DISTRIBUTIONS.get(top, top.replace("_", "-"))
        assert wanted in (packages_of(extra) if extra else CORE), (place, package, extra)


def test_all_is_every_extra_but_converters_to_other_formats():
    left_out = ("all", "dev", "foreign", "browser", "nncf", "executorch", "ncnn", "coreml", "export")
    assert packages_of("all") == set().union(*(packages_of(extra) for extra in EXTRAS if extra not in left_out))


def test_the_extra_of_exports_has_what_every_target_needs():
    from repvgg.deploy.targets import TARGETS

    for name, target in TARGETS.items():
        for package in target.packages:
            assert package in packages_of(target.extra), name
            assert package in packages_of("export"), name


MISSING = [
    ("train", ["train", "repvgg_t0", "--recipe", "quickstart"]),
    ("train", ["data", "check", "fake:8x2"]),
    ("study", ["quickstart"]),
    ("timm", ["convert", "timm:resnet18", "plain.safetensors"]),
    ("train", ["convert", "torchvision:resnet18", "plain.safetensors"]),
    ("hub", ["checkpoint", "inspect", "hub:timm/repvgg_a0.rvgg_in1k"]),
    ("onnx", ["convert", "repvgg:repvgg_t0", "plain.onnx", "--num-classes", "10"]),
]
HELPS = ("train", "eval", "quickstart", "study", "bench", "predict")
NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 4))
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> tuple[pathlib.Path, list[Outcome]]:
    """A folder, and what all commands of these tests did in it, in one process: first those that miss a package."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "net.py").write_text(NETWORK)
    convert = ["convert", "net.py:make", "plain.safetensors", "--input-size", "16", "16"]
    commands = [*(command for _, command in MISSING), convert, ["list"], *([command, "--help"] for command in HELPS)]
    return folder, run(folder, commands)


def test_core_installation_converts_lists_and_explains(core):
    folder, outcomes = core
    converted, listed, *explained = outcomes[len(MISSING) :]
    assert converted.code == 0, converted.err
    assert "1 region folded" in converted.out
    assert (folder / "plain.safetensors").stat().st_size > 0
    assert listed.code == 0, listed.err
    assert "repvgg_a0" in listed.out
    for command, outcome in zip(HELPS, explained, strict=True):
        assert (outcome.code, outcome.err) == (0, ""), command
        assert f"usage: repvgg {command}" in outcome.out


def test_missing_packages_are_one_sentence(core):
    folder, outcomes = core
    for (extra, command), outcome in zip(MISSING, outcomes[: len(MISSING)], strict=True):
        assert outcome.code == 2, (command, outcome)
        lines = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, (command, outcome)
        assert re.fullmatch(rf"error: This needs '\w+', .*: pip install 'repvgg\[{extra}\]'\.", lines[0]), lines
    # They left no file: the conversion that follows them wrote plain.safetensors, which it would not have replaced.
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"net.py", "plain.safetensors"}


def test_versions_agree():
    assert importlib.metadata.version("repvgg") == repvgg.__version__ == PROJECT["version"]
