"""Scores of genotypes by a command of one's own: for searches in spaces that no table lists.

    scorer = OutsideScorer(split_command("python my_scores.py --epochs 3"), Path("runs/search/scores"))
    scores = scorer(genotypes)              # starts: python my_scores.py --epochs 3 .../genotypes.json .../scores.json

The command is started as a list of words, without a shell, and two paths are appended: of a genotype file, which it
reads, and of a file that it writes, a JSON list with one number for each genotype, in their order; higher is better.
What it prints goes to output.txt beside them. Every call has a folder of its own. Scores that are there already, of a
search that was stopped, are read again instead of asked for, so a search can go on without losing any.
"""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from genotypes import Genotype
from plumbing.files import from_json, write_json

MOST_BYTES = 2**26  # of a file of scores


def split_command(text: str) -> list[str]:
    """The words of a command line, quoted as for a shell. Raises ValueError when there is none, or no such program."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"expected the words of a command, got {text!r} ({error})") from None
    if not words:
        raise ValueError("expected the words of a command, got none")
    if shutil.which(words[0]) is None:
        raise ValueError(f"there is no program {words[0]!r}")
    return words


class OutsideScorer:
    """Genotypes -> their scores, by a command.

    command: its words. folder: where the files of the calls are, in folders 0000, 0001, ...
    calls: how many calls there were; a search that goes on begins at 0 again and asks for the same genotypes.
    """

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder, self.calls = command, folder, 0

    def __call__(self, genotypes: Sequence[Genotype]) -> list[float]:
        """One score for each genotype. Raises ValueError, with the reason, when the command does not give them."""
        folder = self.folder / f"{self.calls:04d}"
        asked, given = folder / "genotypes.json", folder / "scores.json"
        wanted = [genotype.to_dict() for genotype in genotypes]
        if asked.exists() and given.exists() and _read(asked) == wanted:
            scores = read_scores(given, len(wanted))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            given.unlink(missing_ok=True)
            write_json(asked, wanted)
            self._start(asked, given)
            scores = read_scores(given, len(wanted))
        self.calls += 1
        return scores

    def _start(self, asked: Path, given: Path) -> None:
        """Run the command to its end. Scores that it leaves count only when it ends with status 0."""
        output, part = given.with_name("output.txt"), given.with_name("scores.part.json")
        part.unlink(missing_ok=True)
        with open(output, "wb") as file:
            try:
                done = subprocess.run(
                    [*self.command, str(asked), str(part)], stdin=subprocess.DEVNULL, stdout=file, stderr=file
                )
            except OSError as error:
                raise ValueError(f"{self.command[0]} cannot be started ({error.strerror})") from None
        if done.returncode:
            raise ValueError(f"{shlex.join(self.command)} ended with status {done.returncode}{_last_line(output)}")
        if not part.is_file():
            raise ValueError(f"{shlex.join(self.command)} ended without writing {part.name}, see {output}")
        read_scores(part, len(_read(asked)))
        part.replace(given)


def read_scores(path: Path, number: int) -> list[float]:
    """The scores of `number` genotypes from a file. Raises ValueError naming the file and what is wrong with it."""
    scores = _read(path)
    if not isinstance(scores, list):
        raise ValueError(f"{path}: expected a JSON list of numbers, got {type(scores).__name__}")
    if len(scores) != number:
        raise ValueError(f"{path}: expected {number} scores, one for each genotype, got {len(scores)}")
    for i, score in enumerate(scores):
        if not isinstance(score, (int, float)) or isinstance(score, bool) or not abs(score) < math.inf:
            raise ValueError(f"{path}: score {i} is no finite number: {json.dumps(score)[:40]}")
    return [float(score) for score in scores]


def _read(path: Path):
    """A file of strict JSON. Raises ValueError naming it."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        return from_json(content.decode())
    except (OSError, ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ValueError(f"{path} cannot be read ({error})") from None


def _last_line(output: Path) -> str:
    """ ": " and the last line that a command printed; where it printed nothing, ""."""
    lines = output.read_bytes()[-4096:].decode(errors="replace").split("\n")
    printed = [line.strip() for line in lines if line.strip()]
    return f": {printed[-1][:200]}" if printed else ""
