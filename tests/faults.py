"""Runs of scripts with a fault in them: a process that has imported the scripts forks one for each run.

    python -m tests.faults MODULE ...     # reads a request a line, as JSON, and answers each by the exit status

The modules are imported before: those that the scripts need most time for.

A request: {"command": ["train_cifar.py", ...], "output": file for stdout and stderr, "fault": a fault}. The child runs
the script as python would, to the interpreter's end. A fault: {"do": what, "at": where, "n": when, ...}.
    at   "step": after the n-th step of any optimizer; "before" or "after": the n-th os.replace; "batch": the n-th batch
         of an evaluation; "score": the n-th genotype that a supernet scores; "seconds": n seconds after the start
    do   a signal by its name; "full": fill the disk of the folder in "path"; "size": limit files to "bytes" bytes;
         "remove": delete the folder in "path"; "twice": SIGINT, and 1.2 seconds later SIGINT again
A script that comes to its end says in a file beside its output, .count, how often it was there.
Nothing of the project knows of this: the places are found by patching functions.
"""

import atexit
import contextlib
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def happen(fault: dict) -> None:
    """Let the fault happen to this process."""
    match fault["do"]:
        case "full":
            with open(Path(fault["path"], "filler"), "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**12))
        case "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
        case "remove":
            shutil.rmtree(fault["path"])
        case "twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGINT)
        case name:
            os.kill(os.getpid(), getattr(signal, name))


def prepare(fault: dict, output: str) -> None:
    """Arrange for the fault to happen at its place."""
    been = []

    def count(*_) -> None:
        been.append(True)
        if len(been) == fault["n"]:
            happen(fault)

    def counted(function, before: bool = True):
        def call(*args, **options):
            if before:
                count()
            result = function(*args, **options)
            if not before:
                count()
            return result

        return call

    atexit.register(lambda: Path(f"{output}.count").write_text(str(len(been))))
    match fault["at"]:
        case "step":
            register_optimizer_step_post_hook(count)
        case "batch":
            torch.Tensor.topk = counted(torch.Tensor.topk)  # which only evaluations call
        case "score":
            scoring = importlib.import_module("build_nas_dataset.scoring")
            scoring.score = counted(scoring.score)
        case "seconds":
            timer = threading.Timer(fault["n"], happen, [fault])
            timer.daemon = True
            timer.start()
        case "before" | "after" as when:
            os.replace = counted(os.replace, when == "before")


def run(request: dict) -> None:
    """Be the script, in a forked child."""
    command = list(map(str, request["command"]))
    for number in (signal.SIGINT, signal.SIGTERM):  # whatever this process was started with
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    prepare(request["fault"], request["output"])
    sys.orig_argv = ["python", *command]
    as_module = command[0] == "-m"
    sys.argv = command[1:] if as_module else command
    if as_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


def serve() -> dict | None:
    """Fork a process for each request and answer it; the request, in the child, and None at the end of the input."""
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()  # not a file, which a limit of file sizes would be for too
        if (pid := os.fork()) == 0:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.close(reading)
            os.close(writing)
            return request
        os.close(writing)
        with open(reading, "rb") as pipe:
            Path(request["output"]).write_bytes(pipe.read())
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if (request := serve()) is not None:
        run(request)
