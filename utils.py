"""What all scripts share: one-line failures, several processes, device, random numbers, learning rates, precision."""

import contextlib
import ctypes
import math
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HOME = Path(__file__).resolve().parent  # of the scripts and of what is shipped with them


# ----------------------------------------------------------------------------------- failures that end in one line


@contextlib.contextmanager
def user_input(flag: str, everywhere: bool = False) -> Iterator[None]:
    """Turn a ValueError or OSError about something the user gave into one line on stderr and exit status 2.

    everywhere: as in `fail`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(f"{flag}: {error}", everywhere)


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn a lack of GPU memory into one line on stderr and exit status 2."""
    try:
        yield
    except RuntimeError as error:  # ending the recording of a graph that met with it can raise another on top
        if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
            raise
        fail(f"out of GPU memory: {advice}")


@contextlib.contextmanager
def writes(path: str | Path) -> Iterator[None]:
    """Within it, a file is written. A full disk, a limit or a folder that is gone ends the script with one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of some
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
            reason = str(error).splitlines()[0]
            if "PytorchStreamWriter" not in str(error) and "enforce fail" not in str(error):
                raise
        else:
            reason = getattr(error if isinstance(error, OSError) else error.__context__, "strerror", None) or error
        fail(f"cannot write {path}: {reason}; what was written before is whole", everywhere=True)


def fail(message: str, everywhere: bool = False):
    """End the script with one line on stderr and exit status 2, as argparse does.

    everywhere: of several processes under torchrun, each says what it met; else, as all read the same, the first only.
    """
    if everywhere or this_process().rank == 0:
        print(f"{script_path().name}: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def one_line(text, most: int = 200) -> str:
    """A text as one line, cut after `most` characters, since it may quote what a file holds.

    The first four paths in it, which say where to look, are not counted.
    """
    kept, paths = [], 4
    for word in str(text)[:100_000].split():
        if paths and os.sep in word and len(word) < 1000:
            paths -= 1
        elif (most := most - len(word) - 1) < 0:
            return " ".join([*kept, f"{word[: max(most + len(word) - 3, 0)]}..."])
        kept.append(word)
    return " ".join(kept)


def script_path() -> Path:
    """The script that runs; of a package started by python -m, its folder."""
    script = Path(sys.argv[0])
    return script.parent if script.name == "__main__.py" else script


# -------------------------------------------------------------------------------------------------- several processes


LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all of them


class Process(NamedTuple):
    """Which of several processes this one is.

    rank: its number from 0, of `world` in all. local_rank: its number on this machine, of `local_world` there.
    master: host:port where they meet. note: what else is to be said, if anything.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master: str = ""
    note: str = ""


def this_process() -> Process:
    """Whether this is one of several processes, and which: everything that depends on it asks here.

    It is where all LAUNCHER_VARIABLES are set, as torchrun does. Where some are, left over in a shell or set by a
    scheduler, it is process 0 of 1, and `note` says so. Ends the script where all are set to what cannot be.
    """
    names = (*LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE")  # the last one is not set by all other launchers
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    told = " ".join(f"{name}={value}" for name, value in found.items())
    if missing := [name for name in LAUNCHER_VARIABLES if name not in found]:
        if not found.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:  # an address alone says nothing
            return Process()
        return Process(note=f"working as one process: {told} is set without {', '.join(missing)}; torchrun sets all")
    values = {"LOCAL_WORLD_SIZE": "1", **found}
    master = values.pop("MASTER_ADDR") + ":" + values["MASTER_PORT"]
    if all(text.isascii() and text.isdecimal() and len(text) < 10 for text in values.values()):
        number = {name: int(text) for name, text in values.items()}
        rank, world, local_rank = (number[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if max(rank, local_rank) < world and 1 <= number["LOCAL_WORLD_SIZE"] <= world and number["MASTER_PORT"] < 2**16:
            return Process(rank, world, local_rank, number["LOCAL_WORLD_SIZE"], master)
    fail(f"environment: expected RANK and LOCAL_RANK below WORLD_SIZE, as torchrun sets them, got {told}", True)


# ------------------------------------------------------------------------------------------------------------- device


def select_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N". Raises ValueError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} is not available: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the kernel at once (CPU tensors, Linux).

    Large tensors otherwise cost a page fault for every 4 KiB each time one is made: measured up to 10 times the
    time of a supernet step. Does nothing elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile, which uses the compilers of the machine, does not work for the device."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except RuntimeError as error:  # torch's message goes on with what tells its developers more
        needed = "a C++ compiler (g++, or what CXX names)" if device.type == "cpu" else "a C compiler and Triton"
        raise ValueError(
            f"torch.compile does not work here, it needs {needed}: {str(error).splitlines()[0]}"
        ) from error


# ----------------------------------------------------------------------------------------------------- random numbers


def set_seed(seed: int) -> None:
    """Seed torch's global random streams (CPU and CUDA), which dropout and initialisation draw from."""
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's global random streams are: that of the CPU and that of a CUDA device."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's global random streams to where they were. On another kind of device, its own go on as they are."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def derive_seed(seed: int, *keys: int) -> int:
    """An independent 63-bit seed for each key, e.g. one for every epoch; zeros at the end of the keys do not count.

    A script that seeds its streams anew at every epoch continues after a stop as if it had never stopped, without
    keeping the state of every random generator in its checkpoint.
    """
    return int(np.random.SeedSequence([seed, *keys]).generate_state(1, np.uint64)[0] >> 1)


# -------------------------------------------------------------------------------------------------------------- paths


def shipped(name: str) -> str:
    """The path of a script or a file that is shipped with the scripts, such as "data/generator.pt" or "gan.py".

    It is `name` itself where that is found from the working directory, and an absolute path elsewhere.
    """
    path = HOME / name
    try:
        return name if os.path.samefile(name, path) else str(path)
    except OSError:
        return str(path)


def shown(path: str | Path) -> str:
    """A path as it is written in a command for the shell."""
    return shlex.quote(str(path))


# ----------------------------------------------------------------------------------------------------------- training


def cosine(step: int, steps: int, high: float, low: float = 0.0) -> float:
    """Cosine schedule from `high` at step 0 to `low` at step `steps`."""
    return low + (high - low) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def on_device(lr: float, device: torch.device) -> float | torch.Tensor:
    """A learning rate for an optimizer: on CUDA a tensor, so that recorded steps see it change (see Recorded)."""
    return torch.tensor(lr, device=device) if device.type == "cuda" else lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def all_finite(*modules: torch.nn.Module | None) -> bool:
    """Whether all weights and buffers of the modules are finite; asked once before they are saved. None counts not."""
    states = (module.state_dict().values() for module in modules if module is not None)
    flags = [tensor.isfinite().all() for state in states for tensor in state]
    return not flags or bool(torch.stack(flags).all())


def stop_if_diverged(epoch: int, loss: float, *modules: torch.nn.Module | None, advice: str) -> None:
    """End the script, before anything is saved, when training has diverged in an epoch (from 1).

    loss: the mean over the epoch. modules: what is to be saved; the last step's update shows in no loss.
    advice: which flag may help.
    """
    if not math.isfinite(loss):
        fail(f"the loss is not finite in epoch {epoch}; {advice}")
    if not all_finite(*modules):
        fail(f"the weights are not all finite numbers after epoch {epoch}; {advice}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state_dict, but keep what depends on the device that this optimizer was built for.

    So a learning rate stays a tensor or a number, as it is here, with the value of the state.
    """
    groups = [
        saved | {name: own[name] for name in ("fused", "foreach", "capturable") if name in own}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    rates = [own["lr"] for own in optimizer.param_groups]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, own, saved in zip(optimizer.param_groups, rates, state["param_groups"], strict=True):
        rate = float(saved["lr"])
        group["lr"] = torch.full_like(own, rate) if isinstance(own, torch.Tensor) else rate


def autocast(amp: str, device: torch.device):
    """The mixed-precision context for --amp auto|off|bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settle_amp(amp, device) == "bf16")


def settle_amp(amp: str, device: torch.device) -> str:
    """What --amp auto means on this device: "off" or "bf16".

    bf16 where the hardware multiplies it; emulated on a CPU, it is several hundred times slower than float32.
    """
    if amp != "auto":
        return amp
    native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "off"
