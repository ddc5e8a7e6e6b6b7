"""The lock of a run folder, which is held while a process writes to it."""

import errno
import os
import platform
import time
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from utils import fail, user_input, writes

HELD: dict[Path, TextIO] = {}  # the locks of this process: folder -> its open file run.lock


def hold_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Hold the lock of a run folder until release_folder or the end of this process, a kill included.

    The file run.lock says who holds it. Ends the script, naming the flag, when another process does.
    """
    if holder := try_to_hold_folder(folder, flag):
        fail(f"{flag}: {folder} is in use: {holder} writes to it", everywhere=True)


def try_to_hold_folder(folder: Path, flag: str) -> str:
    """Hold the lock of a run folder if it is free, and return "". Else return who holds it, as run.lock says it."""
    if (key := folder.resolve()) in HELD:
        return ""
    with user_input(flag):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644), "r+")
    try:
        lock_file(file)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        return holder
    except OSError as error:  # file systems that have no locks
        print(f"note: {folder} cannot be locked ({error.strerror}); see to it that no other run uses it")
    with writes(folder / "run.lock"):
        file.seek(0)
        file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"process {os.getpid()} on {platform.node()}, since {since},", file=file, flush=True)
    HELD[key] = file
    return ""


def release_folder(folder: Path) -> None:
    """Give back the lock of hold_folder, if this process has it."""
    if file := HELD.pop(folder.resolve(), None):
        file.close()


def lock_file(file: TextIO) -> None:
    """Lock an open file for this process alone. Raises BlockingIOError when another one has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # Windows; one byte far behind the text, which so can still be read

    file.seek(2**20)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(errno.EAGAIN, str(error)) from None


def _forget_locks() -> None:
    """In a forked process, which would hold the locks of its parent beyond the parent's end."""
    for file in HELD.values():
        file.close()
    HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
