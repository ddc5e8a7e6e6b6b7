"""Plumbing shared by the scripts: flags, devices, seeds, signals, run folders, checkpoints. Knows nothing of cells."""

import argparse
import atexit
import contextlib
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
from tqdm import tqdm

CHECKPOINT_VERSION = 2
DIGEST = b"sha256:"  # a checkpoint ends with this and the hash of what stands before
RUNS = "runs"  # where results go without --output_dir
HOME = Path(__file__).resolve().parent  # of the scripts and of what is shipped with them
# By these files a run is known.
RESULTS = ("checkpoint*.pt", "generator.pt", "supernet.pt", "nasdata.jsonl", "genotypes.json")


# ---------------------------------------------------------------------------------------------------- bad input


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


# ------------------------------------------------------------------------------------------- several processes

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


class Refused(str):
    """Why a flag of the reference is refused here, in the place of the words that say the same."""


UNREAD = Refused("the reference has this flag but never reads it")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one-line errors, hyphens for underscores, and the names of the public reference's flags.

    description: the docstring of the script, which --help shows as it stands.
    recipes: name of a recipe -> its values by flag; the first is the one used by default. --help shows a default that
        differs between them as "robust 0.002, paper 0.0002".
    reference_flags: a flag of the reference (github.com/kunjing96/NAG), without its dashes -> the words that say the
        same here, with {} in the place of its value; or why it is Refused. They are not shown in --help.
        Example: {"gpu": "--device cuda:{}", "use_aux_head": "--auxiliary_weight 0", "n_cpu": UNREAD}.
    """

    def __init__(
        self,
        description: str,
        recipes: dict[str, dict] | None = None,
        reference_flags: dict[str, str] | None = None,
    ):
        super().__init__(
            description=description, formatter_class=lambda prog: HelpFormatter(prog, recipes=recipes or {})
        )
        self.reference_flags = reference_flags or {}

    def error(self, message: str):
        fail(message)

    def print_help(self, file=None):
        keep_printing()
        super().print_help(file)

    def parse_known_args(self, args=None, namespace=None):
        """Parse the command line. A ~ at the start of a text or path stands for the home folder, as in a shell.

        An empty value is refused: a shell variable that is not set does not leave a flag out.
        """
        words = self._our_words(sys.argv[1:] if args is None else list(args))
        namespace, rest = super().parse_known_args(words, namespace)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if value == "":
                self.error(f"argument {'/'.join(action.option_strings)}: expected a value, got an empty one")
            try:
                expanded = [expand_home(v) for v in value] if isinstance(value, list) else expand_home(value)
            except ValueError as error:
                self.error(f"argument {'/'.join(action.option_strings) or action.dest}: {error}")
            if expanded != value:
                setattr(namespace, action.dest, expanded)
        return namespace, rest

    def _our_words(self, words: list[str]) -> list[str]:
        """The command line with underscores for the hyphens in names of flags, and our flags for the reference's."""
        spelled = {name.replace("-", "_"): name for name in self._option_string_actions}
        found, remaining = [], list(words)
        while remaining:
            word = remaining.pop(0)
            flag, equals, value = word.partition("=")
            known = spelled.get(flag.replace("-", "_")) if flag.startswith("--") else None
            ours = self.reference_flags.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None
            if known or ours is None:
                found.append((known or flag) + equals + value)
            elif isinstance(ours, Refused):
                self.error(f"argument {flag}: {ours}; leave it out")
            elif "{}" not in ours:
                found += ours.split()
            else:
                if not equals and not remaining:
                    self.error(f"argument {flag}: expected one argument")
                value = value if equals else remaining.pop(0)
                found += [part.replace("{}", value) for part in ours.split()]
        return found


def expand_home(value):
    """A text or path that begins with ~ or ~name, with that home folder in its place; anything else as it is.

    A shell does so only where ~ begins a word, which it does not in --output_dir=~/runs. Raises ValueError where there
    is no such home folder.
    """
    if not isinstance(value, (str, Path)) or not str(value).startswith("~"):
        return value
    text = str(value)
    expanded, own = os.path.expanduser(text), text.replace(os.sep, "/").split("/")[0] == "~"
    if expanded.startswith("~") or not os.path.isabs(expanded) or (own and os.environ.get("HOME") == ""):
        raise ValueError(f"there is no home folder for the ~ of {text}; a name that begins with ~ is written ./{text}")
    return type(value)(expanded)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it stands and, after each flag's help, the default that will be used."""

    def __init__(self, prog: str, recipes: dict[str, dict]):
        super().__init__(prog)
        self.recipes = recipes

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(" (default: %(default)s)")  # which some releases add to switches
        values = {name: recipe[action.dest] for name, recipe in self.recipes.items() if action.dest in recipe}
        if len(set(values.values())) > 1:
            shown_values = ", ".join(f"{name} {_as_typed(value)}" for name, value in values.items())
            return f"{text} (default: {shown_values})"
        default = next(iter(values.values()), action.default)
        if default in (None, argparse.SUPPRESS) or (action.nargs == 0 and default is False) or "(default" in text:
            return text
        return f"{text} (default: {_as_typed(default)})"


def _as_typed(value) -> str:
    """A flag's value as one types it; the path of a shipped file as in the folder of the scripts."""
    if isinstance(value, str) and Path(value).is_relative_to(HOME):
        value = Path(value).relative_to(HOME).as_posix()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).replace("%", "%%")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float within [low, high], or (low, high] with `above`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or value in (math.inf, -math.inf):
            what = "a whole number" if kind is int else "a number"
            bound = f"{'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"expected {what} {bound}, got {text!r}")
        return value

    return parse


# ------------------------------------------------------------------------------------------------------- flags


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script has."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=1997, help="all random numbers of the run come from it"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--tf32", action="store_true", help="TF32 in matrix products on CUDA, as in convolutions there")
    group.add_argument("--output_dir", help="folder for all that the run writes (default: runs/<script>-<time>-<pid>)")


def add_cuda_graphs_flag(group: argparse._ActionsContainer) -> None:
    """The flag of scripts that can record their steps as CUDA graphs."""
    text = "replay recorded steps on CUDA; off: slower, in less memory, with the same numbers up to rounding"
    group.add_argument("--cuda_graphs", action=argparse.BooleanOptionalAction, default=True, help=text)


def add_checkpoint_minutes_flag(group: argparse._ActionsContainer) -> None:
    """The flag of scripts that save within an epoch."""
    text = "minutes between checkpoints within an epoch, beside those at its end; 0: after every step"
    group.add_argument("--checkpoint_minutes", type=number(float, 0), default=10.0, help=text)


def parse_resumable(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    kind: str,
    may_change: tuple[str, ...] = (),
    keys: tuple[str, ...] = (),
    before: dict | None = None,
) -> argparse.Namespace:
    """Parse the flags of a training script; with --resume RUN, those of that run's checkpoint.

    Flags given beside --resume must agree with the run, but for --device, --checkpoint_minutes and those in
    `may_change`; --output_dir must be its folder.
    keys: what the checkpoint has to hold.
    before: of flags that runs of older versions lack, the values that these went by, where the defaults are others.
    """
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    with user_input("--resume"):
        saved = load_checkpoint(args.resume, kind, ("args", *keys))["args"]
        latest = folder / "checkpoint.pt"
        if latest.exists() and Path(args.resume).is_file() and not latest.samefile(args.resume):  # it would be lost
            raise ValueError(f"{args.resume} is not the latest of its run; give {folder}")
    saved = {**(before or {}), **saved, "output_dir": str(folder)}
    if args.output_dir and Path(args.output_dir).resolve() == folder.resolve():
        args.output_dir = str(folder)
    explicit, may_change = explicit_flags(parser, argv) - {"resume"}, {"device", "checkpoint_minutes", *may_change}
    for name in sorted(explicit - may_change):
        if saved.get(name) != getattr(args, name):
            parser.error(f"argument --{name}: the run to resume has {saved.get(name)}, and a resumed run keeps it")
    kept = {name: getattr(args, name) for name in explicit & may_change}
    return argparse.Namespace(**{**vars(args), **saved, **kept, "resume": args.resume})


def explicit_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> set[str]:
    """Names of the flags that the command line sets, whatever their values. Exits as parse_args does."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()  # those of set_defaults
    return set(vars(parser.parse_args(argv)))


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


def prepare(args: argparse.Namespace, shared: bool = False) -> torch.device:
    """What every script does first: listen to signals, settle the device, seed, keep memory, print at once.

    shared: whether processes of torchrun can share the script's work.
    Exits with status 2 for a wrong --device, an --output_dir that cannot be written to, --compile where that does not
    work, or torchrun where it is no use.
    """
    signals.listen()
    pace.expect(0)
    keep_printing()
    process = this_process()
    if not shared and process.world > 1:
        fail("torchrun: this script works in one process; start it with python")
    if process.note:
        print(f"note: {process.note}")
    with user_input("--device"):
        device = select_device(args.device)
    with user_input("--output_dir"):
        check_writable(args.output_dir or RUNS)
    if device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are the current device's
    if getattr(args, "compile", False):
        with user_input("--compile"):
            check_compiler(device)
    if args.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    set_seed(args.seed)
    return device


class Tolerant(io.FileIO):
    """A file of text for people, such as stdout, whose reader may go away: what cannot be written then is dropped."""

    def write(self, text) -> int:
        try:
            return super().write(text)
        except OSError:  # a closed pipe (`| head`), a terminal that is gone, a full disk
            return len(text)


def keep_printing() -> None:
    """Print line by line, and let no run end because nobody can read any more what it prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:
            stream.flush()
            buffer = io.BufferedWriter(Tolerant(stream.fileno(), "w", closefd=False))
            ours = io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
            setattr(sys, name, ours)


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where torch.compile, which uses the compilers of the machine, does not work for the device."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except RuntimeError as error:  # torch's message goes on with what tells its developers more
        needed = "a C++ compiler (g++, or what CXX names)" if device.type == "cpu" else "a C compiler and Triton"
        raise ValueError(
            f"torch.compile does not work here, it needs {needed}: {str(error).splitlines()[0]}"
        ) from error


def check_writable(folder: str | Path) -> None:
    """Raise ValueError when a folder is not there and cannot be made, or cannot be written to. Makes nothing."""
    path = Path(folder).absolute()
    there = next(path for path in (path, *path.parents) if os.path.lexists(path))  # also a link that leads nowhere
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"expected a folder that can be written to, got {folder}")


# ------------------------------------------------------------------------------------------------------ signals


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
        for folder in _held:
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


# ----------------------------------------------------------------------------------------------- random numbers


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


# ------------------------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w"):
    """Open a file that appears under its name only when complete: temporary file, flush, fsync, rename."""
    path = Path(path)
    for folder in _held:  # of a run that writes to it
        if folder in path.resolve().parents and not (folder / "run.lock").exists():
            raise FileNotFoundError(errno.ENOENT, "the folder was removed while the run was writing to it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def to_json(data, indent: int | None = None) -> str:
    """Strict JSON, which has no NaN and no infinities: they become null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(data):
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def from_json(text: str | bytes) -> Any:
    """The content of strict JSON. Raises ValueError for others, also for NaN and Infinity, which Python would read."""

    def refuse(name: str):
        raise ValueError(f"{name} is not JSON; null stands for a number that is not known")

    return json.loads(text, parse_constant=refuse)


def write_json(path: str | Path, data) -> None:
    """Write strict JSON, see to_json. Ends the script where that is not possible."""
    with writes(path), atomic_file(path) as file:
        file.write(to_json(data, indent=2) + "\n")


def save_checkpoint(path: str | Path, kind: str, state: dict) -> None:
    """Write a dict of tensors and builtins and the digest of the file. kind: what it is of ("gan", "cifar", ...)."""
    with writes(path), atomic_file(path, "wb") as file:
        hashed = HashedFile(file)
        torch.save({"kind": kind, "version": CHECKPOINT_VERSION, **state}, hashed)
        comment = DIGEST + hashed.hash.hexdigest().encode()
        file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment, here 0, and the comment
        file.write(struct.pack("<H", len(comment)) + comment)


class HashedFile:
    """A file that is written from its start to its end, with the SHA-256 hash of what was written so far."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def check_whole(content: bytes) -> None:
    """Raise ValueError when the content of a checkpoint file is not what save_checkpoint wrote: a bit may have flipped.

    Files without a digest, of other programs or older versions, are checked by the checksums of their parts. A part
    that is compressed is refused, because torch compresses nothing and a few bytes could stand for gigabytes.
    """
    end = content.rfind(DIGEST, -len(DIGEST) - 64)
    if end > 2 and content[end - 2 : end] == struct.pack("<H", len(content) - end):
        found = hashlib.sha256(memoryview(content)[: end - 2])
        found.update(b"\0\0")
        if found.hexdigest().encode() != content[end + len(DIGEST) :]:
            raise ValueError("its content is not what was written: a bit has flipped")
        return
    if not zipfile.is_zipfile(io.BytesIO(content)):  # torch says what is wrong
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if packed := [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its part {packed[0]} is compressed, which torch never does")
        if sum(part.file_size for part in archive.infolist()) > len(content):
            raise ValueError("its parts are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its part {damaged} is wrong: a bit has flipped")


MOST_LAYERS = 1000  # of a network, by a flag
LARGEST = 10**6  # width of a layer, by a flag
WIDTHS = re.compile("channels|latent_dim|.*(emb|hidden|embedding|vertex|graph|label)_sizes?")


def tensors_in(value) -> Iterator[torch.Tensor]:
    """All tensors in nested dictionaries, lists and tuples, each once."""
    seen, waiting = set(), [value]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, (dict, list, tuple)):
            waiting += part.values() if isinstance(part, dict) else part


def check_tensors(value) -> None:
    """Raise ValueError when a tensor, anywhere in what a file held, claims more elements than the file has for it."""
    for tensor in tensors_in(value):
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor in it claims {tensor.numel()} elements, which it does not hold")


def check_declared(state: dict) -> None:
    """Raise ValueError when a checkpoint declares networks that it cannot hold, before anything is built.

    state: its content. The numbers in its flags, its settings and its dictionaries ..._config are looked at: there is a
    tensor for each layer, beyond 10; and a width w, beyond 256, takes matrices of the order of w x w numbers.
    """
    described = {key: value for key, value in state.items() if isinstance(value, dict) and str(key).endswith("_config")}
    held = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in tensors_in(state)} if described else {}
    sizes = list(held.values())
    layers = min(MOST_LAYERS, max(10, len(sizes))) if described else MOST_LAYERS
    width = max(256, math.isqrt(16 * sum(sizes))) if described else LARGEST
    described |= {key: state[key] for key in ("args", "settings") if isinstance(state.get(key), dict)}
    for name, value in ((str(name), value) for declared in described.values() for name, value in declared.items()):
        high = layers if name.endswith("layers") else width if WIDTHS.fullmatch(name) else math.inf
        high = max(256, *sizes) if name == "num_classes" and sizes else high
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not 0 <= number <= high:
                raise ValueError(f"it declares {name[:40]} {str(number)[:40]}, expected 0 to {high:g}")


def load_checkpoint(path: str | Path, kind: str, keys: tuple[str, ...] = ()) -> dict:
    """Read a checkpoint onto the CPU, without running any code from it.

    path: the file, or a run folder that holds checkpoint.pt.
    keys: what it has to hold.
    Raises ValueError naming the file when it is not a whole checkpoint of that kind and of this version.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}")
    try:
        content = path.read_bytes()
        check_whole(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_tensors(state)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a readable checkpoint (it holds more than tensors and plain data)") from None
    except Exception as error:  # truncated or foreign files: torch raises all sorts
        reason = "truncated, or not a torch file"
        if not isinstance(error, (RuntimeError, EOFError)):
            reason = " ".join(str(error).split())[:120]  # it may quote what the file holds
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if state["kind"] != kind:
        raise ValueError(f"{path} is a checkpoint of kind {str(state['kind'])[:80]}, expected kind {kind}")
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} has format version {str(state.get('version'))[:80]}, this code reads {CHECKPOINT_VERSION}"
        )
    try:
        check_declared(state)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{path} is not a whole {kind} checkpoint: it lacks {', '.join(missing)}")
    return state


@contextlib.contextmanager
def of_this_version(path: str | Path) -> Iterator[None]:
    """Within it, networks are built and filled from a checkpoint. Raises ValueError when they have other parts now."""
    try:
        yield
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path} is of another version of these networks ({one_line(error, 120)})") from None


def versions() -> dict:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def code_version() -> dict[str, str | bool | None]:
    """The git commit of the code, and whether its tracked files are "clean": those of that commit.

    Both are None without git, where the scripts lie in no repository of their own, and when git does not answer in 2 s.
    Files that git does not track do not count, since nothing that is tracked imports them. The repository is named, not
    searched for, so that it may belong to another user; nothing is written to it.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of other programs
    command = ["git", "--no-optional-locks", f"--git-dir={HOME / '.git'}", f"--work-tree={HOME}"]
    command += ["-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    command += ["--no-ahead-behind", "--no-renames"]
    options = {"env": variables, "cwd": HOME, "stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        found = subprocess.run(command, **options, stdout=subprocess.PIPE, timeout=2, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        found = []
    commits = [line.split()[2].decode() for line in found if line.startswith(b"# branch.oid ")]
    if not commits or commits == ["(initial)"]:
        return {"commit": None, "clean": None}
    return {"commit": commits[0], "clean": all(line.startswith(b"#") for line in found)}


def device_name(device: torch.device) -> str:
    """What the device is called, for records of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def output_folder(args: argparse.Namespace) -> Path:
    """Where a run writes: --output_dir, or runs/<script>-<time>-<pid>. Made when the first file is written.

    Several runs may be started in the same second.
    """
    name = f"{script_path().stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return Path(args.output_dir) if args.output_dir else Path(RUNS) / name


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


def refuse_used(folder: Path, *patterns: str) -> None:
    """End the script when the folder it is to write to holds results already: files of these names."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            fail(
                f"--output_dir: {folder} holds another run ({path.name}); choose another folder"
                + (f", or go on with that run by --resume {shown(folder)}" if path.name == "checkpoint.pt" else "")
            )


_held: dict[Path, TextIO] = {}  # the locks of this process: folder -> its open file run.lock


def hold_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Hold the lock of a run folder until release_folder or the end of this process, a kill included.

    The file run.lock says who holds it. Ends the script, naming the flag, when another process does.
    """
    if holder := try_to_hold_folder(folder, flag):
        fail(f"{flag}: {folder} is in use: {holder} writes to it", everywhere=True)


def try_to_hold_folder(folder: Path, flag: str) -> str:
    """Hold the lock of a run folder if it is free, and return "". Else return who holds it, as run.lock says it."""
    if (key := folder.resolve()) in _held:
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
    _held[key] = file
    return ""


def release_folder(folder: Path) -> None:
    """Give back the lock of hold_folder, if this process has it."""
    if file := _held.pop(folder.resolve(), None):
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
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def clear_temporary(folder: Path) -> None:
    """Delete what killed processes have left of files that they were writing. The folder's lock is held."""
    for path in folder.rglob(".*.[0-9]*.tmp"):  # as atomic_file names them
        path.unlink(missing_ok=True)


def write_config(folder: Path, args: argparse.Namespace, device: torch.device) -> None:
    """config.json: what is needed to run the same again."""
    config = {
        "args": vars(args),
        "command": shlex.join(sys.orig_argv),  # of one of the processes, if torchrun started several
        "processes": this_process().world,
        "versions": versions(),
        **code_version(),
        "device": device_name(device),
    }
    write_json(folder / "config.json", config)


class RunLog:
    """The record of one run: config.json at the start, metrics.jsonl and TensorBoard events as it goes.

    step: where a resumed run goes on; lines of metrics.jsonl after it (from work that is done again) are dropped. So
    that none is missing, a step is logged before the checkpoint that has it is saved.
    None: a new run. Ends the script when the folder holds one already, or another process writes to it.
    most: where several lines have the same step, the number of lines that there were when the checkpoint was saved:
    those after them are dropped too.
    lines: how many lines there are.
    At its end TensorBoard is told the flags and the last value of each number: its HPARAMS tab compares runs.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        device: torch.device,
        step: int | None = None,
        most: int | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a second

        if step is None:
            refuse_used(folder, *RESULTS)
        hold_folder(folder, "--output_dir" if step is None else "--resume")
        if step is None:
            refuse_used(folder, *RESULTS)  # again, as another run may have ended meanwhile
        clear_temporary(folder)
        self.folder, self.args, self.last = folder, args, {}
        self.path = folder / "metrics.jsonl"
        kept = [] if step is None else [line for line in whole_lines(self.path) if line["step"] <= step][:most]
        self.lines = len(kept)
        with writes(self.path):
            with atomic_file(self.path) as file:
                file.writelines(to_json(line) + "\n" for line in kept)
            write_config(folder, args, device)
            self.writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)
        threading.excepthook = _not_of_tensorboard
        atexit.register(self._flush)

    def log(self, step: int, **values) -> None:
        """Record values at a step: numbers go to TensorBoard too."""
        with writes(self.path):
            with open(self.path, "r+") as file:  # which must be there: the folder may have been removed
                file.seek(0, os.SEEK_END)
                file.write(to_json({"step": step, **values}) + "\n")
            self.lines += 1
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, step)
                    self.last[name] = value

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture (H, W, 3) of bytes in TensorBoard."""
        with writes(self.path):
            self.writer.add_image(name, pixels, step, dataformats="HWC")

    def _write_hparams(self) -> None:
        from torch.utils.tensorboard.summary import hparams  # imported late, as above

        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in vars(self.args).items()}
        for summary in hparams(plain, self.last):
            self.writer.file_writer.add_summary(summary)

    def _flush(self) -> None:
        """Write the last events of a run that ends before its time. One that ends because it cannot write does not."""
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.flush()

    def close(self) -> None:
        """End the record, and let other processes write to the folder."""
        atexit.unregister(self._flush)
        with writes(self.path):
            self._write_hparams()
            self.writer.close()
        release_folder(self.folder)


def _not_of_tensorboard(args: threading.ExceptHookArgs) -> None:
    """threading.excepthook without the thread that writes TensorBoard's events, whose errors are raised in log."""
    if not isinstance(args.exc_value, OSError) or "Writer" not in type(args.thread).__name__:
        threading.__excepthook__(args)


def whole_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, without a last one that a kill has cut off; [] when there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    objects = []
    for line in lines:
        try:
            objects.append(json.loads(line, parse_constant=lambda name: None))  # older versions wrote NaN
        except json.JSONDecodeError:
            break
    return objects


# ---------------------------------------------------------------------------------------------------- progress


LINE_SECONDS = 60  # between two lines on progress where there is no bar; a run that takes less says nothing of the time


def duration(seconds: float) -> str:
    """A duration in words, two units at most: "45 s", "12 min", "3 h 20 min", "2 days 3 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days} days {hours} h" if days > 1 else f"{days} day {hours} h"


class ProgressBar:
    """Iterates over items with a bar on a terminal; elsewhere with a line a minute on stderr, so that none is silent.

    Of several processes under torchrun, the first one shows it. See progress_bar for the arguments.
    """

    def __init__(
        self,
        items: Iterable | None,
        total: int | None,
        desc: str,
        initial: int,
        later: int,
        left: Callable[[], float | None] | None,
    ):
        self.items, self.total, self.desc, self.initial, self.n, self.later = (
            items,
            total,
            desc,
            initial,
            initial,
            later,
        )
        self.seconds_left = left or self._at_this_rate
        self.started = self.said = time.monotonic()
        self.silent = this_process().rank > 0
        options = {"disable": self.silent or None, "leave": False, "dynamic_ncols": True}  # None: unless on a terminal
        self.bar = tqdm(initial=initial, total=total, desc=desc, **options)
        if left and not self.bar.disable:
            self._say()

    def __iter__(self) -> Iterator:
        try:
            for item in self.items:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: int = 1) -> None:
        """Count n more items as done."""
        self.n += n
        self.bar.update(n)
        if not self.silent and (now := time.monotonic()) - self.said >= LINE_SECONDS:
            self.said = now
            self._say()

    def close(self) -> None:
        self.bar.close()

    def _at_this_rate(self) -> float | None:
        """The seconds that the rest takes at the pace up to now; None where that is not known."""
        done = self.n - self.initial
        if not done or self.total is None:
            return None
        return (self.total - self.n + self.later) * (time.monotonic() - self.started) / done

    def _say(self) -> None:
        """Say how far it is, and how long all that is left takes."""
        seconds = self.seconds_left()
        left = "" if seconds is None else f"about {duration(seconds)} left"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"in all {left}" if left else "")
            return
        of = "" if self.total is None else f" of {self.total}"
        print(f"{self.desc}: {self.n}{of}{', ' if left else ''}{left}", file=sys.stderr, flush=True)


def progress_bar(
    items: Iterable | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    later: int = 0,
    left: Callable[[], float | None] | None = None,
) -> ProgressBar:
    """Iterate over items and show how far it is, see ProgressBar; without items, call `update` and `close`.

    desc: what is done. total: how many items there are, those of `initial` included, which were done before a stop.
    later: how many further ones follow after these, which count in the time left. left: gives the seconds left in all,
    in the place of an estimate from these items.
    """
    total = len(items) if total is None and hasattr(items, "__len__") else total
    return ProgressBar(items, total, desc, initial, later, left)


class Pace:
    """How long the training in this process takes, from the steps that it has to do and the time that they have taken.

        pace.expect(epochs * steps)
        for epoch in range(epochs):
            for x in pace.steps(batches, total=steps, desc=f"epoch {epoch + 1}"):
                ...
            print(f"epoch {epoch + 1}: loss {loss:.3f}{pace.left()}")

    After its first 20 steps it says how long the training takes. The first 5 are not timed, since kernels are chosen,
    compiled and recorded in them. What is done between epochs, as evaluations, counts in, but what is `paused`.
    """

    UNTIMED, SAY = 5, 20

    def __init__(self):
        self.expected, self.done, self.started = 0, 0, 0.0

    def expect(self, steps: int) -> None:
        """From now on, a training of that many steps is timed."""
        self.__init__()
        self.expected = steps

    def steps(self, batches: Iterable, **shown) -> Iterator:
        """Iterate over the batches of training steps with a bar. shown: its total, desc and initial."""
        for batch in progress_bar(batches, left=self.seconds_left, **shown):
            yield batch
            self._count()

    def seconds_left(self) -> float | None:
        """The seconds that the rest of the training takes; None where that is not known."""
        if not self.expected or self.done <= self.UNTIMED:
            return None
        return self._seconds_a_step() * max(self.expected - self.done, 0)

    def left(self) -> str:
        """For the end of a line: ", about 43 min left"; "" at the end, or where the training takes under a minute."""
        seconds = self.seconds_left()
        known = seconds and self._seconds_a_step() * self.expected >= LINE_SECONDS
        return f", about {duration(seconds)} left" if known else ""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count as that of the training."""
        before = time.monotonic()
        yield
        self.started += time.monotonic() - before

    def _seconds_a_step(self) -> float:
        return (time.monotonic() - self.started) / (self.done - self.UNTIMED)

    def _count(self) -> None:
        self.done += 1
        if self.done in (self.UNTIMED, self.SAY) and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else only the launches would be timed
        if self.done == self.UNTIMED:
            self.started = time.monotonic()
        if self.done == self.SAY and this_process().rank == 0 and self.left():
            step = self._seconds_a_step()
            known = f"at the pace of its first {self.SAY} steps, {step:.3g} s each"
            tqdm.write(f"the training takes about {duration(step * self.expected)} {known}", file=sys.stderr)


pace = Pace()  # of the training in this process


# ---------------------------------------------------------------------------------------------------- training


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
