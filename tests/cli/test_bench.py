import json
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from repvgg.measure import PROTOCOLS, WallClock
from repvgg.models import create_model, describe_model, save
from repvgg.studies import candidates, timing

FORMS = ["train form", "batch norms folded", "plain form"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No warm-up: the tests do not check times."""
    changes = {
        "interleaved": {"warmup_seconds": 0.0, "min_round_seconds": 1e-4, "rounds": 3},
        "paper": {"warmup_calls": 2, "rounds": 3, "batch": 2},
    }
    for name, protocol in PROTOCOLS.items():
        monkeypatch.setitem(PROTOCOLS, name, replace(protocol, **changes[name]))


class Ticks:
    """A clock that moves by one at each look."""

    now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


@pytest.fixture
def ticking(monkeypatch):
    """Whatever runs takes a second."""
    monkeypatch.setattr("repvgg.measure.RunSettings.stopwatch", lambda setting, batch: WallClock(Ticks()))


def test_table(repvgg, files):
    outcome = repvgg("bench", files.train, "--rounds", 3, "--batch", 2)
    assert (outcome.code, outcome.err) == (0, "")
    title, *rows = outcome.out.splitlines()
    assert title.split() == ["form", "median", "ms", "quartiles", "images/s", "speed-up", "quartiles"]
    assert [" ".join(row.split()[:-5]) for row in rows[:3]] == FORMS
    assert rows[0].split()[-2:] == ["1.00", "1.00-1.00"]
    assert "3 rounds; speed-ups over train form" in rows
    threads = torch.get_num_threads()
    about = f"{files.train}: batch 2, 16 x 16, float32, contiguous, {threads} threads, protocol interleaved"
    assert about in rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_json(repvgg, dtype):
    arguments = ("--rounds", 1, "--input-size", 9, "--threads", 2, "--dtype", dtype, "--channels-last", "--json")
    before = torch.get_num_threads()
    outcome = repvgg("bench", "repvgg_t0", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads(outcome.out)
    assert [timing["name"] for timing in result["timings"]] == FORMS
    assert all(timing["rounds"] == 1 and timing["median_seconds"] > 0 for timing in result["timings"])
    settings = {"models": ["repvgg_t0"], "batches": [1], "input_size": 9, "dtype": dtype, "channels_last": True}
    assert settings.items() <= result["settings"].items()
    assert {"protocol", "rounds", "engine", "device", "threads", "compile"} <= result["settings"].keys()
    assert set(result["denormals"]) == set(FORMS)
    assert (result["failures"], result["complete"]) == ([], True)
    assert result["environment"]["threads"] == "2"
    assert torch.get_num_threads() == before


def test_says_so_when_there_is_no_speed_up(repvgg, files, ticking):
    out = repvgg("bench", files.train).out.splitlines()
    assert "The plain form is not clearly faster than the train form here." in out
    out = repvgg("bench", "repvgg_t0", files.train, "--baseline", "train.safetensors", "--input-size", 9).out
    assert f"The plain form of repvgg_t0 is not clearly faster than {files.train}, plain form here." in out.splitlines()


@pytest.fixture
def net(tmp_path):
    """A network of somebody else's."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make_net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),\n"
        "        nn.Linear(4 * 49, 2))\n"
    )
    return f"{tmp_path / 'net.py'}:make_net"


def test_several_models_and_batch_sizes(repvgg, net):
    outcome = repvgg("bench", "repvgg_t0", net, "--baseline", "make_net", "--input-size", 9, "--batch", "2,1")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    names = [f"repvgg_t0, {form}" for form in FORMS] + [net]
    for batch in ("batch 2", "batch 1"):
        start = lines.index(batch)
        assert lines[start + 1].split()[0] == "model"
        assert [" ".join(row.split()[:-5]) for row in lines[start + 2 : start + 6]] == names
        assert lines[start + 5].split()[-2:] == ["1.00", "1.00-1.00"], "the baseline is as fast as itself"
    start = next(i for i, line in enumerate(lines) if "ms for one image" in line)
    assert [row.split("  ")[0] for row in lines[start + 1 : start + 5]] == names


def test_a_plain_checkpoint_is_timed_alone(repvgg, files):
    outcome = repvgg("bench", files.plain, "--rounds", 2, "--json")
    (timing,) = json.loads(outcome.out)["timings"]
    assert (outcome.code, timing["name"], timing["rounds"]) == (0, str(files.plain), 2)
    assert timing["median_seconds"] > 0
    assert "2 rounds" in repvgg("bench", files.plain, "--rounds", 2).out


def test_different_image_sizes_are_told_before_the_numbers(repvgg, files):
    names = ["repvgg_t0", files.train]
    note, title, *_ = repvgg("bench", *names, "--rounds", 1).out.splitlines()
    assert f"(repvgg_t0 32 x 32, {files.train} 16 x 16); --input-size" in note
    assert title.startswith("model")
    shapes = json.loads(repvgg("bench", *names, "--rounds", 1, "--json").out)["settings"]["image_shapes"]
    assert shapes == {"repvgg_t0": [3, 32, 32], str(files.train): [1, 16, 16]}
    assert repvgg("bench", *names, "--rounds", 1, "--input-size", 9).out.startswith("model")


def test_a_model_of_somebody_else_alone_has_three_forms_too(repvgg, net):
    result = json.loads(repvgg("bench", net, "--input-size", 9, "--json").out)
    assert [timing["name"] for timing in result["timings"]] == FORMS


def test_the_papers_protocol(repvgg):
    outcome = repvgg("bench", "repvgg_t0", "--protocol", "paper", "--input-size", 8, "--json")
    result = json.loads(outcome.out)
    assert (result["settings"]["batches"], result["settings"]["rounds"]) == ([2], 3)
    assert {timing["rounds"] for timing in result["timings"]} == {3}
    title = repvgg("bench", "repvgg_t0", "--protocol", "paper", "--input-size", 8).out.splitlines()[0]
    assert "mean ms" in title


def test_a_plain_checkpoint_next_to_others(repvgg, files, tmp_path):
    plain = create_model("repvgg_t0", plain=True)
    save(tmp_path / "plain.safetensors", plain, describe_model(plain, "plain"))
    out = repvgg("bench", tmp_path / "plain.safetensors", "repvgg_t0", "--input-size", 8).out
    assert out.splitlines()[1].startswith(f"{tmp_path / 'plain.safetensors'}  ")


def test_denormal_weights_are_told_of_and_flushed_on_request(repvgg, tmp_path):
    model = create_model("repvgg_t0").eval()
    with torch.no_grad():
        model.head.weight.fill_(1e-39)
    save(tmp_path / "tiny.safetensors", model, describe_model(model, "train"))
    out = repvgg("bench", tmp_path / "tiny.safetensors", "--input-size", 8).out
    assert "train form: 128,000 of " in out
    assert "--flush-denormal rounds them to 0" in out
    flushed = repvgg("bench", tmp_path / "tiny.safetensors", "--input-size", 8, "--flush-denormal", "--json")
    assert json.loads(flushed.out)["denormals"]["plain form"]["activations"] == 0
    assert (torch.tensor(1e-30) * 1e-9).view(torch.int32), "afterwards as before"


def test_a_model_without_memory_is_told_of_and_the_rest_goes_on(repvgg, monkeypatch):
    def hungry(model, *, prove):
        return nn.Sequential(Hungry()), None

    monkeypatch.setattr(candidates, "fold_batch_norms", hungry)
    outcome = repvgg("bench", "repvgg_t0", "--input-size", 8)
    assert outcome.code == 0
    assert "batch norms folded: out of memory (DefaultCPUAllocator: can't allocate memory)" in outcome.out
    rows = outcome.out.splitlines()
    assert [" ".join(row.split()[:-5]) for row in rows[1:3]] == ["train form", "plain form"]


def test_what_the_memory_of_a_cpu_surely_cannot_hold_is_not_tried(repvgg, refused, monkeypatch):
    """For 32 images of 32x32 the train form holds 7.7 MB of activations at its peak, the plain form 5.6."""
    monkeypatch.setattr(timing, "available_memory", lambda device: 6.5e6)
    outcome = repvgg("bench", "repvgg_t0", "--batch", "1,32", "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    lost = {row["name"]: row["reason"] for row in result["failures"]}
    assert "train form" in lost
    assert "plain form" not in lost
    assert lost["train form"].endswith("0.0 GB are free")
    assert {row["name"] for row in result["timings"] if row["batch"] == 1} == set(FORMS)
    monkeypatch.setattr(timing, "available_memory", lambda device: 0)
    assert "not enough memory for any of these" in refused("bench", "repvgg_t0", "--batch", 2)


class Hungry(nn.Module):
    def forward(self, x):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(("after", "code", "kept"), [(2, 130, 0), (4, 130, 4), (8, 130, 5)])
def test_ctrl_c_keeps_what_was_measured(repvgg, monkeypatch, after, code, kept):
    """Five rounds of each of two batch sizes; the second has had 3 rounds when the eighth reading comes."""
    monkeypatch.setattr(timing, "take_samples", interrupted_after(after, timing.take_samples))
    outcome = repvgg("bench", "repvgg_t0", "--input-size", 8, "--batch", "1,2", "--rounds", 5, "--json")
    assert outcome.code == code
    if not kept:
        assert (outcome.out, outcome.err) == ("", "interrupted\n")
        return
    result = json.loads(outcome.out)
    assert not result["complete"]
    assert result["timings"][0]["rounds"] == kept
    assert {timing["batch"] for timing in result["timings"]} == ({1, 2} if after == 8 else {1})


def interrupted_after(readings, take):
    """``take_samples`` that ends by Ctrl-C after so many readings in all."""
    left = [readings]

    def taking(calls, protocol, on_reading, **more):
        def keep(reading):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            on_reading(reading)

        return take(calls, protocol, keep, **more)

    return taking


def test_a_name_wins_over_a_file_of_that_name(repvgg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repvgg_t0").write_text("no checkpoint")
    assert repvgg("bench", "repvgg_t0", "--rounds", 1, "--input-size", 8).code == 0


@pytest.mark.parametrize("flag", ["--batch", "--input-size", "--rounds", "--threads"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_that_make_no_sense(refused, flag, number):
    assert "at least 1" in refused("bench", "repvgg_t0", flag, number)


def test_models_that_cannot_be_timed(refused, files, tmp_path):
    assert "There is no file" in refused("bench", tmp_path / "missing.safetensors")
    assert "There is a folder" in refused("bench", tmp_path)
    assert "did you mean repvgg_a0" in refused("bench", "repvgg_a00")
    assert "did you mean resnet18" in refused("bench", "repvgg_t0", "resnet81")
    assert "each once" in refused("bench", "repvgg_t0", "repvgg_t0")
    assert "did you mean repvgg_t0" in refused("bench", "repvgg_t0", "--baseline", "repvgg_t1")


def test_images_that_a_network_does_not_take(refused, net):
    said = refused("bench", "repvgg_t0", net, "--input-size", 8, "--dtype", "float16")
    assert "cannot run on images of 1 x 3 x 8 x 8 in float16: " in said
    assert "mat1 and mat2 shapes cannot be multiplied" in said
    assert "Take another size or dtype." in said


def test_devices_that_are_not_there(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device here" in refused("bench", "repvgg_t0", "--device", "cuda")
    assert "use --device cuda" in refused("bench", "repvgg_t0", "--dtype", "tf32")


def test_what_cannot_be_compiled(refused, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: Uncompilable())
    assert "No C++ compiler found. Take another size or dtype, or leave out --compile." in refused(
        "bench", "repvgg_t0", "--input-size", 8, "--compile"
    )


class Uncompilable(nn.Module):
    def forward(self, x):
        raise ValueError("No C++ compiler found.\nTraceback of a compiler")


@pytest.mark.parametrize("arguments", [("--batch", "x"), ("--dtype", "int8"), ("--rounds", "1.5")])
def test_values_that_do_not_parse(repvgg, arguments):
    outcome = repvgg("bench", "repvgg_t0", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert arguments[0] in outcome.err


def test_more_images_than_memory(refused):
    assert "not enough memory" in refused("bench", "repvgg_t0", "--batch", 10**12)


def test_the_bar_of_a_terminal_is_drawn_between_rounds_only(repvgg, files, monkeypatch):
    """A bar that a thread draws would take its time from what is being timed."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal
    seen = []
    take = timing.take_samples

    def taking(*arguments, **more):
        seen.append({thread.name for thread in threading.enumerate()})
        return take(*arguments, **more)

    before = {thread.name for thread in threading.enumerate()} | {"repvgg-interrupt"}  # the command line's own
    monkeypatch.setattr(timing, "take_samples", taking)
    outcome = repvgg("bench", files.train, "--rounds", 2)
    assert outcome.code == 0
    assert "rounds" in outcome.err
    assert seen == [before]
    assert outcome.out.startswith("form ")


@pytest.fixture
def unsupported(tmp_path):
    """A network with a function that the engine does not support."""
    (tmp_path / "odd.py").write_text(
        "from torch import nn\n\n\ndef make_odd():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardshrink())\n"
    )
    return f"{tmp_path / 'odd.py'}:make_odd"


def test_engines_side_by_side(repvgg, unsupported):
    """Networks that an engine cannot run are reported, and the others are timed in the same rounds."""
    outcome = repvgg("bench", "repvgg_t0", unsupported, "--input-size", 9, "--engine", "torch,repvgg", "--batch", "1,2")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    start = next(at for at, line in enumerate(lines) if line.split()[:1] == ["model"])
    names = [f"repvgg_t0, {form}, {engine}" for form in FORMS for engine in ("torch", "repvgg")]
    found = [" ".join(row.split()[:-5]) for row in lines[start + 1 : start + 8]]
    assert sorted(found) == sorted([*names, f"{unsupported}, torch"])
    assert any(line.startswith(f"{unsupported}, repvgg: left out, '1' (Hardshrink) is not supported") for line in lines)
    assert any("engine torch, repvgg" in line for line in lines)


def test_an_engine_alone(repvgg, tmp_path):
    result = json.loads(repvgg("bench", "repvgg_t0", "--input-size", 9, "--engine", "repvgg", "--json").out)
    assert [timing["name"] for timing in result["timings"]] == FORMS
    assert list(result["left_out"]) == []
    assert (result["settings"]["engine"], list(result["denormals"])) == ("repvgg", FORMS)


def test_a_plain_checkpoint_in_two_engines(repvgg, tmp_path):
    plain = create_model("repvgg_t0", plain=True)
    save(tmp_path / "plain.safetensors", plain, describe_model(plain, "plain"))
    out = repvgg("bench", tmp_path / "plain.safetensors", "--engine", "repvgg,torch").out
    assert [row.split(", ")[-1].split()[0] for row in out.splitlines()[1:3]] == ["repvgg", "torch"]
    assert repvgg("bench", tmp_path / "plain.safetensors", "--engine", "repvgg").code == 0


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            "onnx",
            "There is no engine 'onnx': choose one of torch, repvgg, repvgg-searched, onnxruntime, openvino, "
            "executorch, ncnn.",
        ),
        ("torch,torch", "Name the engines, each once."),
    ],
)
def test_engines_that_are_not_there(repvgg, engine, words):
    outcome = repvgg("bench", "repvgg_t0", "--engine", engine)
    assert (outcome.code, outcome.err) == (2, f"error: {words}\n")


def test_an_engine_that_can_run_nothing(repvgg, unsupported):
    outcome = repvgg("bench", unsupported, "--engine", "repvgg", "--input-size", 9)
    assert outcome.code == 2
    assert outcome.err.startswith(
        "error: The engine supports none of these models, for example 'train form': '1' (Hardshrink)"
    )
    outcome = repvgg("bench", "repvgg_t0", "--engine", "repvgg", "--dtype", "bfloat16")
    assert (outcome.code, "computes in float32 on the CPU" in outcome.err) == (2, True)


STRUCTURED = """
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: list

class Net(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.pack = pack

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        z = self.head(y.mean((2, 3)))
        return {"dict": {"out": z, "aux": (y,)}, "tuple": (z, [y]), "dataclass": Output(z, [y])}[self.pack]

def mapping(): return Net("dict")
def pair(): return Net("tuple")
def record(): return Net("dataclass")
"""


@pytest.mark.parametrize("factory", ["mapping", "pair", "record"])
def test_outputs_of_any_structure(repvgg, tmp_path, factory):
    (tmp_path / "structured.py").write_text(STRUCTURED)
    source = f"{tmp_path / 'structured.py'}:{factory}"
    outcome = repvgg("bench", source, "--batch", 1, "--rounds", 1, "--input-size", 8, "--json")
    assert outcome.code == 0, outcome.err
    assert [timing["name"] for timing in json.loads(outcome.out)["timings"]] == FORMS


def test_exported_files_run_in_their_own_runtime(repvgg, refused, files, tmp_path):
    out = tmp_path / "plain.torchscript"
    assert repvgg("export", files.plain, out, "--to", "torchscript").code == 0
    outcome = repvgg("bench", files.plain, out, "--rounds", "1", "--batch", "1,3", "--engine", "torch", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    names = [f"{files.plain}", f"{out}, torch"]
    assert [(one["batch"], one["name"]) for one in found["timings"]] == [(n, name) for n in (1, 3) for name in names]
    assert found["settings"]["image_shapes"][str(out)] == [1, 16, 16]
    assert "the file takes images of 1 x 16 x 16 only" in refused("bench", out, "--input-size", "17")
