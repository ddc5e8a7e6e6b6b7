"""The folder of a run: its name, config.json, metrics.jsonl and the events of TensorBoard."""

import argparse
import atexit
import contextlib
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from plumbing.files import atomic_file, to_json, whole_lines, write_json
from plumbing.locks import hold_folder, release_folder
from utils import HOME, fail, script_path, shown, this_process, writes

RUNS = "runs"  # where results go without --output_dir
# By these files a run is known.
RESULTS = ("checkpoint*.pt", "generator.pt", "supernet.pt", "nasdata.jsonl", "genotypes.json")


def check_writable(folder: str | Path) -> None:
    """Raise ValueError when a folder is not there and cannot be made, or cannot be written to. Makes nothing."""
    path = Path(folder).absolute()
    there = next(path for path in (path, *path.parents) if os.path.lexists(path))  # also a link that leads nowhere
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"expected a folder that can be written to, got {folder}")


def versions() -> dict:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def code_version() -> dict[str, str | bool | None]:
    """The git commit of the code, and whether its tracked files are "clean": those of that commit.

    Both are None without git, where the scripts lie in no repository of their own, and when git does not answer in ten
    seconds, of which a busy machine may need several.
    Files that git does not track do not count, since nothing that is tracked imports them. The repository is named, not
    searched for, so that it may belong to another user; nothing is written to it.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of other programs
    command = ["git", "--no-optional-locks", f"--git-dir={HOME / '.git'}", f"--work-tree={HOME}"]
    command += ["-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    command += ["--no-ahead-behind", "--no-renames"]
    options = {"env": variables, "cwd": HOME, "stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        found = subprocess.run(command, **options, stdout=subprocess.PIPE, timeout=10, check=True).stdout.splitlines()
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


def refuse_used(folder: Path, *patterns: str) -> None:
    """End the script when the folder it is to write to holds results already: files of these names."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            fail(
                f"--output_dir: {folder} holds another run ({path.name}); choose another folder"
                + (f", or go on with that run by --resume {shown(folder)}" if path.name == "checkpoint.pt" else "")
            )


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
