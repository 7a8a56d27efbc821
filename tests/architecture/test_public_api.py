"""Which imports are allowed, what importing costs, and what the public API exports."""

import json
import pathlib
import subprocess
import sys

import pytest

import repvgg

ROOT = pathlib.Path(repvgg.__file__).parent
HEAVY = {
    *("lightning", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript", "matplotlib", "sklearn", "rich", "tyro"),
    *("safetensors", "huggingface_hub", "torchmetrics", "scipy", "pandas", "PIL"),
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


# What a process prints that has imported torch and nothing else; all are forked from one, because torch takes seconds.
AFTER_TORCH = {
    "new modules": "import sys; before = {*sys.modules}; import repvgg; import torch; "
    "assert not torch.cuda.is_initialized(); print(*({*sys.modules} - before))",
    "dir": "import repvgg; repvgg.is_plain; import repvgg.deploy, repvgg.verify; print(*dir(repvgg))",
    "packages": "import repvgg; print(repvgg.training.RepOptimizer.__name__, repvgg.blocks.create_block.__name__, "
    "repvgg.data.open_data.__name__, repvgg.errors.UsageError.__name__, repvgg.deploy.ship.__name__)",
    "verify": "import repvgg, repvgg.verify.comparison; from repvgg.verify import Evidence; print(repvgg.verify)",
    # The dependencies of the engine are imported when something is compiled.
    "engine": "import repvgg, sys; before = 'repvgg.engine' in sys.modules; names = repvgg.engine.__all__; "
    "print(before, 'engine' in dir(repvgg), names, {'llvmlite', 'platformdirs'} & {*sys.modules})",
}
FORKS = """
import json, os, sys, torch
for code in json.loads(sys.argv[1]):
    print("---", flush=True)
    pid = os.fork()
    if not pid:
        try:
            exec(code, {})
            sys.stdout.flush()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, code
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """The output of each process of AFTER_TORCH."""
    command = [sys.executable, "-c", FORKS, json.dumps([*AFTER_TORCH.values()])]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(AFTER_TORCH, out.split("---\n")[1:], strict=True))


def test_imports_point_down():
    """The contracts in pyproject.toml, checked by import-linter."""
    run = subprocess.run(
        [str(pathlib.Path(sys.executable).parent / "lint-imports")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_import_is_lean_and_starts_no_device(printed):
    new = {name.partition(".")[0] for name in printed["new modules"].split()}
    assert "repvgg" in new
    assert not new & HEAVY


def test_public_names_are_documented():
    assert repvgg.__all__ == sorted(repvgg.__all__)
    for name in repvgg.__all__:
        value = getattr(repvgg, name)
        assert value.__doc__, name
        assert value.__module__.startswith("repvgg."), name
    assert (ROOT / "py.typed").exists()


def test_names_are_imported_on_first_use():
    loaded = python("import repvgg, sys; print('torch' in sys.modules); repvgg.is_plain; print('torch' in sys.modules)")
    assert loaded.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'reparametrize'"):
        repvgg.reparametrize  # noqa: B018


def test_dir_shows_the_public_api_alone(printed):
    modules = {"blocks", "data", "engine", "errors", "training"}
    assert set(printed["dir"].split()) == {*repvgg.__all__, *modules, "__version__"}


def test_packages_are_attributes(printed):
    assert printed["packages"].split() == ["RepOptimizer", "create_block", "open_data", "UsageError", "ship"]


def test_the_package_verify_does_not_hide_the_function(printed):
    assert printed["verify"].startswith("<function verify")


def test_the_engine_is_reached_without_its_dependencies(printed):
    # InTorch and Network are the names that CompiledModel and TorchFallback had before.
    names = [
        "CompiledLibrary",
        "CompiledModel",
        "InTorch",
        "Network",
        "PartitionedModel",
        "TorchFallback",
        "clear_cache",
        "compile",
        "load",
        "repvgg_backend",
    ]
    assert printed["engine"].strip() == f"False True {names} set()"


def test_every_package_exports_what_it_lists():
    for package in ROOT.iterdir():
        if not (package / "__init__.py").exists() or package.name in ("cli", "studies"):
            continue
        module = __import__(f"repvgg.{package.name}", fromlist=["__all__"])
        names = [name for name in module.__all__ if name != "__all__"]
        assert set(names) == set(module.__all__)
        assert all(hasattr(module, name) for name in names), package.name


def test_no_addresses_and_no_machine_names():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT.parents[1], capture_output=True, text=True, check=False)
    files = tracked.stdout.split() or [str(path) for path in ROOT.rglob("*.py")]
    forbidden = ["pypi" + ".org", "files.python" + "hosted", "down" + "load.pytorch"]
    for name in files:
        path = ROOT.parents[1] / name
        if path.suffix in (".py", ".md", ".toml", ".yml", "") and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not any(word in text for word in forbidden), name


def test_errors_form_one_tree():
    from repvgg import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, (errors.RepvggError, Warning)) for kind in kinds)
    assert all(kind.__name__ in errors.__doc__ for kind in kinds)


def test_a_missing_extra_is_named():
    import pytest

    from repvgg.errors import MissingDependencyError, require

    with pytest.raises(MissingDependencyError, match=r"pip install 'repvgg\[engine\]'"):
        require("a_package_that_is_not_there", "engine")
