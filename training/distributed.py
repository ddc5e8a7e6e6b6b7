"""Several processes, started by torchrun, that work on one run. A script started by hand is process 0 of 1.

    torchrun --standalone --nproc_per_node=2 train_cifar.py ...

    device = distributed.start(prepare(args, shared=True))
    ...
    distributed.finish()

Every process reads the same flags and files, so bad input ends all of them alike; process 0 alone writes and prints.
"""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # see finish
from torch import nn

from utils import fail

LONGEST_WAIT = timedelta(days=7)  # candidates take long; torchrun itself ends the others when a process dies

_alone = False


def start(device: torch.device) -> torch.device:
    """Join the other processes, if torchrun started this one. Returns the device of this process.

    device: of --device; a CUDA device becomes that of LOCAL_RANK.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= (there := torch.cuda.device_count()):
            fail(f"torchrun: --nproc_per_node: expected at most the {there} CUDA devices there are", everywhere=True)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    if device.type != "cuda":  # NCCL waits for the others
        atexit.register(finish)  # after a failure too
    return device


def finish() -> None:
    """Leave the others. Nothing may hold the process group then: where gloo's threads live on, they sometimes abort
    the interpreter as it ends. DistributedDataParallel may be part of a reference cycle; and it imports
    torch.distributed.nn, whose functions have the group as default argument if there is one at that time.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def planned_world() -> int:
    """The number of processes, known before `start` too: for checking flags."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def processes() -> str:
    """How many there are, in words."""
    return "1 process" if world() == 1 else f"{world()} processes"


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process works by itself, whatever the others do: as process 0 of 1."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(n: int) -> slice:
    """This process's part of n things: contiguous parts, disjoint, together all of them."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_buffers(network: nn.Module) -> None:
    """Give every process the mean of the running statistics, each of which has seen its own images only."""
    if world() > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(sum_over_ranks(buffer.clone()) / world())


def barrier() -> None:
    """Wait for the others."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Within it, process 0 goes ahead while the others wait: for work that leaves files behind.

    If process 0 fails, the others end too, and leave it to say why.
    """
    if not is_main():
        if not same_everywhere(None):
            sys.exit(2)
        yield
        return
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the others may be gone
            same_everywhere(False)
        raise
    same_everywhere(True)


def merged(own: dict) -> dict:
    """The entries of all processes."""
    parts = [own]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def same_everywhere(value: Any) -> Any:
    """What process 0 has."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]
