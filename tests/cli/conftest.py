"""A command line in this process, and small checkpoints to use it on."""

import pytest
import torch

from repvgg import reparameterize
from repvgg.cli import main
from repvgg.models import create_model, describe_model, save
from tests.bn_statistics import trained_like
from tests.cli.helpers import Files, Outcome, contents


@pytest.fixture
def repvgg(capsys, monkeypatch):
    """Return a function that calls the command line and returns its exit code and output."""
    # On a busy machine a command may take half a minute: without lines of progress on standard error.
    monkeypatch.setattr("repvgg._progress._SECONDS_BETWEEN_LINES", 1e6)

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(repvgg, tmp_path):
    """Return a function that expects a refusal: one sentence on standard error, exit code 2, no file changed."""

    def call(*arguments):
        before = contents(tmp_path)
        outcome = repvgg(*arguments)
        assert outcome.code == 2
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert outcome.err.endswith("\n")
        assert outcome.err.count("\n") == 1
        assert contents(tmp_path) == before
        return outcome.err

    return call


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = trained_like(create_model("repvgg_t0", num_classes=10, in_channels=1))
    plain, _ = reparameterize(model)
    about = {"input_size": 16, "classes": tuple("0123456789")}
    save(folder / "train.safetensors", model, describe_model(model, "train", **about))
    save(folder / "plain.safetensors", plain, describe_model(plain, "plain", **about))
    return Files(folder / "train.safetensors", folder / "plain.safetensors", model)
