"""Several processes, started by torchrun, that work on one run. A script started by hand is process 0 of 1.

    torchrun --standalone --nproc_per_node=2 train_cifar.py ...

    device = distributed.start(prepare(args, shared=True))
    ...
    distributed.finish()

Every process reads the same flags and files, so bad input ends all of them alike. Process 0 alone writes and prints.
"""

import atexit
import contextlib
import functools
import gc
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported before there is a process group, see finish
from torch import nn

from utils import fail, this_process

LONGEST_START = timedelta(minutes=10)  # for all processes to meet; torchrun itself may have been killed meanwhile
LONGEST_WAIT = timedelta(days=7)  # a candidate takes long; when a process dies, torchrun itself ends the others
PATIENCE = 30  # seconds, after which a process says that it waits for the others to start

_alone = False  # see alone


def start(device: torch.device) -> torch.device:
    """Join the other processes, if there are any: see this_process. Returns the device of this process.

    device: the device of --device; of several GPUs, each process takes the one with its local rank.
    """
    process = this_process()
    if process.world == 1:
        return device
    if device.type != "cpu":
        device = torch.device(device.type, process.local_rank)
        if device.index >= (there := torch.accelerator.device_count()):
            fail(f"torchrun: --nproc_per_node: expected at most the {there} GPUs of this machine", everywhere=True)
        torch.accelerator.set_device_index(device.index)
    who = f"process {process.rank} of {process.world}"
    waiting = threading.Timer(PATIENCE, print, [f"{who} is waiting for the others at {process.master}"])
    waiting.daemon = True
    waiting.start()
    backend = "gloo" if device.type == "cpu" else "nccl"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=LONGEST_START))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=LONGEST_WAIT)
    except (dist.DistError, ValueError) as error:
        fail(f"torchrun: {who} does not find the others at {process.master}: {error}", everywhere=True)
    finally:
        waiting.cancel()
    if device.type == "cpu":
        atexit.register(finish)  # after a failure too; not with NCCL, which would wait for the other processes
    return device


def finish() -> None:
    """Leave the other processes.

    Gloo's threads end with the last reference to the process group; those that live on sometimes abort the interpreter
    as it ends. So the garbage collector runs first, as DistributedDataParallel may be part of a reference cycle, and
    torch.distributed.nn is imported at the top of this file: imported later, its functions would keep the group as a
    default argument.
    """
    if dist.is_initialized():
        _cpu_group.cache_clear()
        gc.collect()
        dist.destroy_process_group()


def planned_world() -> int:
    """The number of processes, which is known before `start` too, for the checks of flags."""
    return this_process().world


def world() -> int:
    """The number of processes that work on the run."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def processes() -> str:
    """How many processes there are, in words."""
    return "1 process" if world() == 1 else f"{world()} processes"


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this context, the process works as process 0 of 1, whatever the others do."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def share(n: int) -> slice:
    """This process's part of n items. The parts of all processes are contiguous, disjoint and together all items."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_buffers(network: nn.Module) -> None:
    """Replace the running statistics of batch norms by their means over all processes, which saw different images."""
    if world() > 1:
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(sum_over_ranks(buffer.clone()) / world())


def barrier() -> None:
    """Wait until all processes are here; signals are still heeded, unlike in a call that only waits."""
    if world() > 1:
        waiting = dist.barrier(async_op=True)
        while not waiting.is_completed():
            time.sleep(0.01)
        waiting.wait()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Within this context, process 0 works first while the others wait, and then find the files that it has written.

    If process 0 fails, the others end too, and process 0 says why.
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


def gathered(own: Any) -> list:
    """The values that the processes have, by their numbers."""
    parts = [own]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, own)
    return parts


def merged(own: dict) -> dict:
    """The entries of the dicts of all processes in one dict."""
    return {key: value for part in gathered(own) for key, value in part.items()}


def largest(value: int) -> int:
    """The largest of the numbers that the processes have. They meet on the CPU, so that no GPU is waited for."""
    if world() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_cpu_group())
    return int(tensor)


@functools.cache
def _cpu_group() -> dist.ProcessGroup | None:
    """The process group for tensors on the CPU; None stands for the group of all else, where that is it."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def same_everywhere(value: Any) -> Any:
    """The value that process 0 has, for all processes."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]
