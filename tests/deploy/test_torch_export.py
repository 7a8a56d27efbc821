import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repvgg.deploy import ProgramRunner, export_program
from repvgg.errors import ExportError, OutputError, OutputExistsError, UsageError
from repvgg.models import ModelSpec, Stage, create_model

TINY = ModelSpec("tiny", Stage(1, 4), (Stage(2, 8),))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = create_model(TINY, 3, plain=True)
    path = tmp_path_factory.mktemp("program") / "plain.pt2"
    return model, export_program(model, path, (3, 9, 11), notes={"about": "a test"})


def test_output_equals_the_model(exported):
    model, export = exported
    assert export.dynamic_batch
    assert model.training  # restored
    runner = ProgramRunner(export.path)
    assert repr(runner) == f"ProgramRunner({str(export.path)!r})"
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 9, 11)
        with torch.no_grad():
            assert_close(runner(x), model.eval()(x))
    model.train()


def test_notes_are_stored(exported):
    notes = {"about": ""}
    torch.export.load(exported[1].path, extra_files=notes)
    assert notes == {"about": "a test"}


def test_other_sizes_are_rejected(exported):
    with pytest.raises(Exception, match=r"size\(\)\[2\] == 9"):
        ProgramRunner(exported[1].path)(torch.zeros(1, 3, 8, 11))


class OneImage(nn.Module):
    def forward(self, x):
        return torch.cat([image[None].relu() for image in x.unbind()])


class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


def test_models_with_a_fixed_batch(tmp_path):
    path = tmp_path / "one.pt2"
    with pytest.raises(ExportError, match="for any number of images"):
        export_program(OneImage(), path, (3, 8, 8))
    assert not path.exists()
    assert not export_program(OneImage(), path, (3, 8, 8), dynamic_batch=False).dynamic_batch
    assert ProgramRunner(path)(-torch.ones(1, 3, 8, 8)).sum() == 0


def test_unsupported_models_are_rejected(tmp_path, capfd):
    with pytest.raises(ExportError, match="cannot be exported for an image"):
        export_program(DataDependent(), tmp_path / "a.pt2", (3, 8, 8), dynamic_batch=False)
    with pytest.raises(UsageError, match="3 positive integers"):
        export_program(nn.ReLU(), tmp_path / "a.pt2", (3, 0, 8))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_unwritable_paths_are_rejected(tmp_path, monkeypatch):
    (tmp_path / "a.pt2").write_text("precious")
    with pytest.raises(OutputExistsError):
        export_program(nn.ReLU(), tmp_path / "a.pt2", (3, 8, 8))
    with pytest.raises(OutputError, match="no folder"):
        export_program(nn.ReLU(), tmp_path / "missing" / "a.pt2", (3, 8, 8))

    def disk_full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . No space left on device")

    monkeypatch.setattr("torch.export.save", disk_full)
    with pytest.raises(OutputError, match=r"could not be written: .*No space left"):
        export_program(nn.ReLU(), tmp_path / "b.pt2", (3, 8, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


def test_invalid_files_are_rejected(exported, tmp_path, capfd):
    (tmp_path / "text.pt2").write_text("not a program")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt2")
    complete = exported[1].path.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(complete[: len(complete) // 2])
    for name in ("text", "weights", "cut", "missing"):
        with pytest.raises(ExportError, match=f"{name}.pt2'"):
            ProgramRunner(tmp_path / f"{name}.pt2")
    assert capfd.readouterr() == ("", "")
