"""Run jobs in processes forked from one that has imported everything; a job is a line of JSON on standard input.

    {"argv": [...], "log": FILE, "stop": [EVENT, COUNT, SIGNAL] or null}
    {"ranks": 2, "log": FILE, "out": FILE}

The first kind runs ``repvgg`` with ``argv``, and sends the process the signal when the event happens for the COUNTth
time. The second runs ``ddp_script.both`` in as many processes, with the environment that torchrun would give them.
Answers with one line: the exit code of the first process that failed, or 0.
"""

import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import traceback


def main():
    preload()
    for line in sys.stdin:
        job = json.loads(line)
        sys.stdout.write(f"{run_job(job)}\n")
        sys.stdout.flush()


def run_job(job):
    """Return the exit code of the first process that failed, or 0."""
    if "argv" in job:
        pids = [fork(job["log"], lambda: run_command(job["argv"], job["stop"]))]
    else:
        ranks, port = job["ranks"], free_port()
        pids = [fork(job["log"], lambda rank=rank: run_rank(rank, ranks, port, job["out"])) for rank in range(ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return next((code for code in codes if code), 0)


PRELOADED = (
    "matplotlib.backends.backend_agg",
    "repvgg.data.sources.local",
    "repvgg.training.run_folder",
    "safetensors.torch",
    "tests.training.ddp_script",
    "torch.utils.tensorboard",
    "torchmetrics.functional.classification",
    "torchvision.transforms.v2",
)


def preload():
    for name in PRELOADED:
        importlib.import_module(name)
    for module in pkgutil.iter_modules(importlib.import_module("repvgg.cli").__path__, "repvgg.cli."):
        importlib.import_module(module.name)


def fork(log, work):
    """Start a process that does ``work``, writes its output to ``log`` and exits with what ``work`` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_command(argv, stop):
    from repvgg.cli import main as command_line
    from repvgg.training import run_folder

    run_folder.draw_curve = lambda *_: None  # a third of the time of these runs; no test of them looks at the picture
    if stop is not None:
        arm(*stop)
    return command_line(argv)


def run_rank(rank, ranks, port, out):
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "tests",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from tests.training import ddp_script

    ddp_script.both(out)
    return 0


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def arm(event, count, number):
    """Send this process the signal ``number`` when ``event`` happens for the ``count``th time."""
    import torch

    from repvgg.training import run_folder, task

    left = count

    def strike():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    def strike_before(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            strike()
            return original(*arguments, **keywords)

        setattr(owner, name, call)

    if event == "step":
        strike_before(task.ClassificationTask, "training_step")
    elif event == "validation":
        strike_before(task.ClassificationTask, "validation_step")
    elif event == "epoch written":
        strike_before(run_folder.RunFolder, "write_epoch")
    elif event == "checkpoint saved":
        strike_before(torch, "save")
    elif event == "end":
        strike_before(run_folder.RunFolder, "finish")
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
