"""Faults that happen to a script, in a process of its own: see tests/starting.py.

A fault: {"do": what, "at": where, "n": when, ...}.
    at   "step": after the n-th step of any optimizer; "before" or "after": the n-th os.replace; "batch": the n-th batch
         of an evaluation; "score": the n-th genotype that a supernet scores; "seconds": n seconds after the start
    do   a signal by its name; "full": fill the disk of the folder in "path"; "size": limit files to "bytes" bytes;
         "remove": delete the folder in "path"; "twice": SIGINT, and 1.2 seconds later SIGINT again
A script that comes to its end says in the file "count", if one is named, how often it was there.
Nothing of the project knows of this: the places are found by patching functions.
"""

import atexit
import contextlib
import importlib
import os
import resource
import shutil
import signal
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


def prepare(fault: dict) -> None:
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

    if "count" in fault:
        atexit.register(lambda: Path(fault["count"]).write_text(str(len(been))))
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
