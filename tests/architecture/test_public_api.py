"""Which imports are allowed, what importing costs, and what the public API exports."""

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


def test_imports_point_down():
    """The contracts in pyproject.toml, checked by import-linter."""
    run = subprocess.run(
        [str(pathlib.Path(sys.executable).parent / "lint-imports")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout


def test_import_is_lean_and_starts_no_device():
    before, after = "import sys, torch; before = set(sys.modules)", "print(*(set(sys.modules) - before))"
    device = "assert not torch.cuda.is_initialized()"
    new = {name.partition(".")[0] for name in python(f"{before}; import repvgg; {device}; {after}").split()}
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


def test_dir_shows_the_public_api_alone():
    modules = {"blocks", "data", "engine", "errors", "training"}
    shown = python("import repvgg; repvgg.is_plain; import repvgg.deploy, repvgg.verify; print(*dir(repvgg))").split()
    assert set(shown) == {*repvgg.__all__, *modules, "__version__"}


def test_packages_are_attributes():
    names = ["training.RepOptimizer", "blocks.create_block", "data.open_data", "errors.UsageError", "deploy.ship"]
    found = python("import repvgg; print(" + ", ".join(f"repvgg.{name}.__name__" for name in names) + ")").split()
    assert found == [name.partition(".")[2] for name in names]


def test_the_package_verify_does_not_hide_the_function():
    code = "import repvgg; import repvgg.verify.comparison; from repvgg.verify import Evidence; print(repvgg.verify)"
    assert python(code).startswith("<function verify")


def test_the_engine_is_reached_without_its_dependencies():
    """They are imported when something is compiled."""
    loaded = python(
        "import repvgg, sys; before = 'repvgg.engine' in sys.modules; names = repvgg.engine.__all__;"
        "print(before, 'engine' in dir(repvgg), names, {'llvmlite', 'platformdirs'} & {*sys.modules})"
    )
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
    assert loaded.strip() == f"False True {names} set()"


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
