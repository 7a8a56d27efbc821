"""Forks a process that has imported everything for each job: a line of JSON on standard input.

    {"argv": [...], "log": FILE, "stop": [EVENT, COUNT, SIGNAL] or null}

runs ``repvgg`` with ``argv``, and sends itself the signal as the event happens for the COUNTth time. Answers with a
line for the exit code.
"""

import importlib
import json
import os
import signal
import sys
import traceback


def main():
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
            run(**job)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def preload():
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("repvgg.cli")._verbs()


PRELOADED = (
    "matplotlib.backends.backend_agg",
    "repvgg.data.sources.local",
    "repvgg.training.run_folder",
    "safetensors.torch",
    "torch.utils.tensorboard",
    "torchmetrics.functional.classification",
    "torchvision.transforms.v2",
)


def run(argv, log, stop):
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if stop is not None:
            arm(*stop)
        from repvgg.cli import main as command_line

        code = command_line(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def arm(event, count, number):
    """Send this process the signal ``number`` as ``event`` happens for the ``count``th time."""
    import torch

    from repvgg.training import run_folder, task

    left = count

    def strike():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    def before(owner, name, hit=strike):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            hit()
            return original(*arguments, **keywords)

        setattr(owner, name, call)

    if event == "step":
        before(task.ClassificationTask, "training_step")
    elif event == "judging":
        before(task.ClassificationTask, "validation_step")
    elif event == "epoch kept":
        before(run_folder.RunFolder, "write_epoch")
    elif event == "epoch saved":
        before(torch, "save")
    elif event == "end":
        before(run_folder.RunFolder, "finish")
    elif event == "half a file":
        original = torch.save

        def save(content, path):
            nonlocal left
            left -= 1
            original(content, path)
            if left == 0:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save
    else:
        raise ValueError(event)


if __name__ == "__main__":
    main()
