"""Files that are whole or not there at all, and strict JSON."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from plumbing.locks import HELD
from utils import writes


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w"):
    """Open a file that appears under its name only when complete: temporary file, flush, fsync, rename."""
    path = Path(path)
    for folder in HELD:  # of a run that writes to it
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
