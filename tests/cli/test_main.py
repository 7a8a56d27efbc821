import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from repvgg import __version__
from repvgg.cli import _interrupt, main
from repvgg.cli._interrupt import interrupt_message
from repvgg.errors import RepvggError

# A change here is a change of what people type: make it on purpose, and say so.
COMMAND_LINE = {
    "quickstart": ["--help", "--out", "--overwrite", "--seed"],
    "list": ["--help", "--json"],
    "profile": [
        "--batch",
        "--dtype",
        "--form",
        "--help",
        "--input-size",
        "--json",
        "--paper",
        "--per",
        "--winograd",
        "MODEL",
    ],
    "train": [
        "--accelerator",
        "--auxiliary-weight",
        "--batch-size",
        "--channels-last",
        "--compile",
        "--config",
        "--cutmix",
        "--data.allow-commands",
        "--data.augment.alternate-flip",
        "--data.augment.crop",
        "--data.augment.crop-padding",
        "--data.augment.crop-ratio",
        "--data.augment.crop-scale",
        "--data.augment.erase",
        "--data.augment.erase-size",
        "--data.augment.flip",
        "--data.augment.jitter.degrees",
        "--data.augment.jitter.scale",
        "--data.augment.jitter.translate",
        "--data.augment.mask.blur",
        "--data.augment.mask.blur-sigma",
        "--data.augment.mask.brightness",
        "--data.augment.mask.contrast",
        "--data.augment.mask.degrees",
        "--data.augment.mask.hue",
        "--data.augment.mask.rotation",
        "--data.augment.mask.saturation",
        "--data.augment.mask.scale",
        "--data.augment.policy",
        "--data.augment.randaugment-magnitude",
        "--data.augment.randaugment-ops",
        "--data.cache",
        "--data.channels",
        "--data.crop-fraction",
        "--data.ignore-index",
        "--data.interpolation",
        "--data.mean",
        "--data.on-bad",
        "--data.std",
        "--data.test-size",
        "--data.train-size",
        "--data.uri",
        "--data.val",
        "--data.workers",
        "--device-batch",
        "--devices",
        "--dry-run",
        "--ema",
        "--epochs",
        "--expand",
        "--help",
        "--init",
        "--label-smoothing",
        "--mixup",
        "--model",
        "--nodes",
        "--optim.clip",
        "--optim.custom-l2",
        "--optim.decay",
        "--optim.head-lr",
        "--optim.lr",
        "--optim.lr-batch",
        "--optim.momentum",
        "--optim.nesterov",
        "--optim.norm-bias-lr",
        "--optim.schedule",
        "--optim.warmup-epochs",
        "--optim.weight-decay",
        "--out",
        "--overwrite",
        "--precision",
        "--progressive",
        "--qat.calibration-images",
        "--qat.enabled",
        "--qat.equalize",
        "--qat.granularity",
        "--qat.learn-ranges",
        "--qat.observe-epochs",
        "--qat.percentile",
        "--qat.ranges",
        "--qat.weight-bits",
        "--recipe",
        "--resume",
        "--save-steps",
        "--seed",
        "--sync-bn",
        "--threads",
        "--whiten-stem",
    ],
    "eval": [
        "--absent",
        "--allow-commands",
        "--batch",
        "--crop-fraction",
        "--data",
        "--flip",
        "--form",
        "--help",
        "--ignore-index",
        "--input-size",
        "--json",
        "--overwrite",
        "--report",
        "--scales",
        "--split",
        "--stride",
        "--tta",
        "--window",
        "--workers",
        "CHECKPOINT",
    ],
    "predict": [
        "--classes",
        "--crop-fraction",
        "--engine",
        "--flip",
        "--help",
        "--input-size",
        "--json",
        "--out",
        "--overwrite",
        "--scales",
        "--stride",
        "--threads",
        "--top",
        "--tta",
        "--window",
        "CHECKPOINT",
        "IMAGE",
    ],
    "convert": [
        "--help",
        "--input-shape",
        "--input-size",
        "--model",
        "--num-classes",
        "--overwrite",
        "--policy",
        "--report",
        "--weights",
        "OUT",
        "SOURCE",
    ],
    "export": [
        "--crop-fraction",
        "--data",
        "--help",
        "--images",
        "--input-size",
        "--interpolation",
        "--json",
        "--max-batch",
        "--model",
        "--name",
        "--num-classes",
        "--onnxruntime-web",
        "--overwrite",
        "--packed-weights",
        "--precision",
        "--rounds",
        "--single-file",
        "--target",
        "--threads",
        "--to",
        "--weights",
        "--with-preprocessing",
        "OUT",
        "SOURCE",
    ],
    "quantize": [
        "--calibration-images",
        "--data",
        "--granularity",
        "--help",
        "--html",
        "--input-size",
        "--min-agreement",
        "--model",
        "--no-correct-biases",
        "--no-equalize",
        "--no-pair-bound",
        "--num-classes",
        "--overwrite",
        "--ranges",
        "--report-only",
        "--rounding-sweeps",
        "--selection-images",
        "--test-images",
        "--weight-bits",
        "--weights",
        "OUT",
        "SOURCE",
    ],
    "verify": [
        "--batch",
        "--batches",
        "--help",
        "--input-size",
        "--json",
        "--seed",
        "--tolerance",
        "CANDIDATE",
        "REFERENCE",
    ],
    "bench": [
        "--baseline",
        "--batch",
        "--channels-last",
        "--compile",
        "--device",
        "--dtype",
        "--engine",
        "--flush-denormal",
        "--help",
        "--input-size",
        "--json",
        "--protocol",
        "--rounds",
        "--threads",
        "MODEL",
    ],
    "study": ["--help", "--out", "--overwrite", "NAME"],
    "data check": ["--allow-commands", "--help", "--ignore-index", "--json", "--limit", "--val", "--workers", "URI"],
    "checkpoint inspect": ["--help", "--json", "FILE"],
    "checkpoint convert": ["--form", "--help", "--overwrite", "--to", "FILE", "OUT"],
}


def arguments_in(text):
    """The arguments that the boxes of a help text explain."""
    return sorted(set(re.findall(r"^[│ ] (?:-h, )?(--[a-z][a-z0-9.-]*|[A-Z]{3,}(?=  ))", text, flags=re.MULTILINE)))


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_overview_names_every_command(repvgg, arguments):
    outcome = repvgg(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.findall(r"^  ([a-z]+(?: [a-z]+)?)  ", outcome.out, flags=re.MULTILINE) == list(COMMAND_LINE)


@pytest.mark.parametrize("command", COMMAND_LINE)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_explains_every_argument(repvgg, command, flag):
    outcome = repvgg(*command.split(), flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: repvgg {command} [-h]")
    assert arguments_in(outcome.out) == COMMAND_LINE[command]
    assert "None" not in outcome.out or command == "train"  # whose flags take what a config.yaml takes


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("command", ["", *COMMAND_LINE])
def test_help_fits_the_terminal(repvgg, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = repvgg(*command.split(), "--help").out
    assert max(map(len, out.splitlines()[1:])) <= columns  # the usage line is as long as tyro makes it
    assert "\n\n\n" not in out


def test_examples_in_help_use_known_flags(repvgg):
    text = "".join(repvgg(*command.split(), "-h").out for command in COMMAND_LINE)
    examples = [line.split() for line in re.findall(r"^ {4,}repvgg (.*)$", text, flags=re.MULTILINE)]
    assert len(examples) >= 4
    for command, second, *rest in examples:
        flags = {word for word in (second, *rest) if word.startswith("--")}
        known = COMMAND_LINE[command if command in COMMAND_LINE else f"{command} {second}"]
        of_studies = [
            "--engine",
            "--checkpoints",
            "--max-gmacs",
            "--threads",
            "--data",
            "--epochs",
            "--jobs",
            "--train",
            "--init",
        ]
        more = {"train": ["--data"], "study": of_studies}  # short flags, and those of a single study
        assert flags <= {*known, *more.get(command, [])}


def test_unknown_command(refused):
    assert refused("lisst") == "error: There is no command 'lisst': did you mean list?\n"
    commands = "quickstart, list, profile, train, eval, predict, convert, export, quantize, verify, bench, study"
    assert f"{commands}, data check, checkpoint" in refused("xyzzy")
    assert "'--frobnicate'" in refused("--frobnicate")


@pytest.mark.parametrize("arguments", [("checkpoint",), ("checkpoint", "-h"), ("checkpoint", "--help")])
def test_commands_of_two_words(repvgg, refused, arguments):
    outcome = repvgg(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert re.findall(r"^  (checkpoint [a-z]+)  ", outcome.out, flags=re.MULTILINE) == [
        "checkpoint inspect",
        "checkpoint convert",
    ]
    assert "no command 'checkpoint inspekt': did you mean checkpoint inspect?" in refused("checkpoint", "inspekt")
    assert "choose one of checkpoint inspect, checkpoint convert." in refused("checkpoint", "a.pth")


@pytest.mark.parametrize("command", COMMAND_LINE)
def test_unknown_flag(refused, command):
    """It is named, whether or not other arguments are missing or wrong."""
    said = refused(*command.split(), "--frobnicate", "1")
    assert said.startswith(f"error: repvgg {command} has no option '--frobnicate': ")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("train", "--lr", "0.1"), "--optim.lr?"),
        (("train", "--recipe", "cifar", "--epoch=3"), "--epochs?"),
        (("convert", "a.pth", "b.onnx", "--imput-size", "3", "3"), "--input-size or --input-shape?"),
        (("study", "table1", "--overwite"), "--overwrite?"),
    ],
)
def test_misspelt_flag(refused, arguments, meant):
    assert refused(*arguments).endswith(f"did you mean {meant}\n")


def test_other_mistakes_are_explained_once(repvgg):
    outcome = repvgg("train", "--epochs", "many")
    assert (outcome.code, outcome.out, outcome.err.count("--epochs INT")) == (2, "", 1)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["checkpoint"], ["nonsense"]])
def test_the_overview_takes_no_torch(arguments):
    code = f"import sys; from repvgg.cli import main; main({arguments}); print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize("arguments", [("convert",), ("convert", "one"), ("collapse", "one"), ("verify", "one")])
def test_wrong_number_of_arguments(repvgg, arguments):
    outcome = repvgg(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"repvgg {arguments[0]} --help" in outcome.err


def test_version_as_a_module():
    done = subprocess.run([sys.executable, "-m", "repvgg", "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"repvgg {__version__}\n", "")


def raising(error):
    def command() -> None:
        """Raise."""
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (RepvggError("Line one\nand line two."), 2, "error: Line one and line two.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: There is not enough memory for this: take smaller or fewer images.\n"),
    ],
)
def test_exit_codes(repvgg, monkeypatch, error, code, text):
    monkeypatch.setattr("repvgg.cli.app.load_command", lambda name: raising(error))
    outcome = repvgg("list")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", text)


def test_ctrl_c_is_answered_while_the_main_thread_is_busy(repvgg, monkeypatch):
    """A kernel that runs for a second delays Python's own handler, not the message."""
    seen = []

    def command() -> None:
        """Compute."""
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            with interrupt_message(lambda: "interrupted; continue with: repvgg list"):
                hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
                time.sleep(5)  # the signal may be late on a busy machine
        except KeyboardInterrupt:
            seen.append("in time")
            raise

    def tell():
        seen.append(threading.current_thread().name)
        real()

    real = _interrupt.tell
    monkeypatch.setattr(_interrupt, "tell", tell)
    monkeypatch.setattr("repvgg.cli.app.load_command", lambda name: command)
    # Another test of this process may have left a handler of its own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = repvgg("list")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted; continue with: repvgg list\n")
    assert seen[0] == "repvgg-interrupt"


def test_errors_after_ctrl_c_are_its_consequences(repvgg, monkeypatch):
    def command() -> None:
        """Fail when interrupted."""
        try:
            with interrupt_message(lambda: "interrupted"):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("a worker died") from None

    monkeypatch.setattr("repvgg.cli.app.load_command", lambda name: command)
    assert repvgg("list").code == 130


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr("repvgg.cli.app.load_command", lambda name: raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])


def test_a_pipe_that_closes_early_is_no_error(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["--help"]) == 0
    assert capsys.readouterr().err == ""
