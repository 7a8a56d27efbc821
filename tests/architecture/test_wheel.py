"""A wheel built from the sources works without the repository: all data files are in it."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import repvgg

ROOT = pathlib.Path(__file__).parents[2]


def call(*command, **more):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, check=False, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_every_data_file_is_in_the_wheel(wheel):
    source = pathlib.Path(repvgg.__file__).parent
    files = {path for path in source.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so")}
    wanted = {f"repvgg/{path.relative_to(source)}" for path in files}
    assert "repvgg/py.typed" in wanted
    assert {path.suffix for path in files} >= {".py", ".cpp", ".c", ".ll", ".css", ".j2"}
    with zipfile.ZipFile(wheel) as archive:
        assert wanted <= set(archive.namelist())


@pytest.mark.slow
def test_runs_in_a_fresh_environment(wheel, tmp_path):
    """Installed by pip into a new environment; dependencies come from the environment of the tests."""
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    python, scripts = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    # Paths in a .pth file come last and are not searched for .pth files: an editable repvgg there stays invisible.
    site = pathlib.Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    more = {"cwd": tmp_path, "env": environment}
    assert "repvgg_a0" in call(scripts / "repvgg", "list", **more)
    out = tmp_path / "plain.safetensors"
    text = call(scripts / "repvgg", "collapse", "repvgg:repvgg_t0", out, "--num-classes", 10, **more)
    assert "7 regions folded" in text
    assert out.stat().st_size > 0
    # The engine reads its thread pool, and a report page its templates, from the package.
    code = (
        "import torch, repvgg\n"
        "print(repvgg.__file__)\n"
        "plain, _ = repvgg.reparameterize(repvgg.create_model('repvgg_t0', num_classes=10).eval(), prove=False)\n"
        "x = torch.randn(2, 3, 32, 32)\n"
        "fast = repvgg.engine.compile(plain, (2, 3, 32, 32), threads=2)\n"
        "torch.testing.assert_close(fast(x), plain(x).detach(), rtol=1e-3, atol=1e-3)\n"
    )
    pytest.importorskip("llvmlite")
    assert str(tmp_path) in call(python, "-W", "ignore", "-c", code, **more)
