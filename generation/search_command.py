"""Scores of genotypes by a command of the user's, for searches in spaces that are too large to list."""

import shlex
import shutil
import subprocess
from pathlib import Path

from genotypes import Genotype
from utils import from_json, write_json

MOST_BYTES = 2**24  # of scores.json


class CommandScorer:
    """Scores genotypes by a command, started as a list of arguments (no shell) with two paths appended.

    command: as typed in a shell. folder: where a folder for each call is made, which holds genotypes.json (a list of
    genotypes, to read), scores.json (a list of as many numbers, to write) and log.txt (what the command printed).
    calls: how many there were; folders are named by it.
    Raises ValueError when the command cannot be started or does not write what is expected.
    """

    def __init__(self, command: str, folder: Path):
        try:
            self.words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"{error} in {command!r}") from None
        if not self.words:
            raise ValueError("expected a command, got an empty one")
        if shutil.which(self.words[0]) is None:
            raise ValueError(f"there is no program {self.words[0]!r}")
        self.folder, self.calls = folder, 0

    def __call__(self, genotypes: list[Genotype]) -> list[float]:
        folder = self.folder / f"{self.calls:04d}"
        self.calls += 1
        source, target, log = (folder / name for name in ("genotypes.json", "scores.json", "log.txt"))
        write_json(source, [genotype.to_dict() for genotype in genotypes])
        target.unlink(missing_ok=True)  # of a call that was stopped
        with open(log, "wb") as file:
            status = subprocess.run([*self.words, str(source), str(target)], stdout=file, stderr=file).returncode
        if status:
            raise ValueError(f"the command ended with exit status {status}; what it printed: {log} ({_last_line(log)})")
        return read_scores(target, len(genotypes))


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-2000:].decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "nothing")


def read_scores(path: Path, n: int) -> list[float]:
    """The n numbers of a file. Raises ValueError when it holds anything else."""
    if not path.is_file():
        raise ValueError(f"the command did not write {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES} bytes")
    try:
        scores = from_json(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(scores, list) or len(scores) != n:
        found = f"{len(scores)} entries" if isinstance(scores, list) else type(scores).__name__
        raise ValueError(f"{path}: expected a list of {n} numbers, got {found}")
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 1e300:
            raise ValueError(f"{path}, entry {i}: expected a finite number, got {str(score)[:40]!r}")
    return [float(score) for score in scores]
