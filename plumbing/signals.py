"""What signals ask of a script: to end, or to save."""

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from plumbing.locks import HELD
from utils import script_path, shown, this_process


class Signals:
    """What signals ask of this process.

    SIGINT (Ctrl-C) and SIGTERM end the script by one line, with exit status 130 and 143: at once or, within `held`,
    where the loop that trains asks for `stop` after a step. A second one, from a second after the first, ends the
    process at once (programs that pass a signal on often send it twice).
    SIGUSR1 asks for a checkpoint: `save`. SIGHUP, of a terminal that was closed, is ignored; under torchrun, which ends
    by it, it is as SIGTERM.

    stop: the number of the signal that the script is to end by, or 0.
    """

    def __init__(self):
        self.stop, self.save, self._received, self._react = 0, False, 0.0, self.end

    def listen(self) -> None:
        """From now on, react to signals. What the parent process has set to be ignored stays so."""
        self.__init__()
        if threading.current_thread() is not threading.main_thread():  # Python allows it nowhere else
            return
        handlers = {"SIGINT": self._stop, "SIGTERM": self._stop, "SIGUSR1": self._save, "SIGHUP": signal.SIG_IGN}
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends with its terminal, and its processes 30 s later
            handlers["SIGHUP"] = self._stop
        for name, handler in handlers.items():
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _stop(self, number: int, frame) -> None:
        if not self.stop:
            self.stop, self._received = number, time.monotonic()
            self._react()
        elif time.monotonic() > self._received + 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _save(self, number: int, frame) -> None:
        self.save = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within it, SIGINT and SIGTERM wait: until its end, unless `stop` is asked for before."""
        with self._reacting(lambda: None):
            yield
        if self.stop:
            self._react()

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Within it, SIGINT and SIGTERM raise KeyboardInterrupt; also one that has waited."""
        with self._reacting(self._interrupt):
            if self.stop:
                self._interrupt()
            yield

    @contextlib.contextmanager
    def _reacting(self, react: Callable[[], None]) -> Iterator[None]:
        before, self._react = self._react, react
        try:
            yield
        finally:
            self._react = before

    @staticmethod
    def _interrupt() -> None:
        raise KeyboardInterrupt

    def tell(self) -> None:
        """Say, in the first process, by which signal the script ends, and how to go on with the run if there is one."""
        if this_process().rank:
            return
        line = f"{script_path().name}: ended by {signal.Signals(self.stop).name}"
        for folder in HELD:
            if (folder / "checkpoint.pt").exists():
                line += f"; go on with: {command()} --resume {shown(short(folder))}"
        print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the script by the signal that was received."""
        self.tell()
        sys.exit(128 + self.stop)


signals = Signals()  # of this process


def command() -> str:
    """The command that this script was started by, without its flags: for example "python train_cifar.py"."""
    words = [word for word in sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1] if word != "-u"]
    process = this_process()
    if not process.master:
        return shlex.join(["python", *words])
    nodes = process.world // process.local_world
    where = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", "..."]
    return " ".join(["torchrun", *where, f"--nproc_per_node={process.local_world}", shlex.join(words)])


def short(path: Path) -> Path:
    """An absolute path, relative to the working directory where it lies there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
