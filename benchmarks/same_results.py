"""Do two checkouts of the project compute the same? Runs the scripts of both, and compares all that they write.

    python benchmarks/same_results.py OLD NEW                               # OLD, NEW: folders of checkouts
    python benchmarks/same_results.py OLD NEW --data DIR --cache_dir DIR    # also what needs images
    python benchmarks/same_results.py OLD NEW --only gan-paper golden --out same.json

Each checkout's own scripts run as subprocesses in its folder: on the CPU, in one thread, from one seed, at small sizes
that keep the default networks of the GAN (its NAS dataset is cut to 256 records, so that an epoch has 4 steps) and
make those of images tiny (1 normal cell per stack, 8 channels, 16 px). What is compared is every tensor of the
checkpoints and every value of the JSON files but for times, versions and flags; a digest is SHA-256 over the bytes of
all of them, in order of their names. Names that have changed stand in the tables below; a flag is spelled as each
checkout's --help spells it, so that any two checkouts can be compared, before and after a change of names.

Prints a line for each file, with the largest difference where it is not equal: of numbers relative to the largest
number of the tensor, so that rounding can be told from change. Exit status 1 when something differs.

DIR holds train.zip and test.zip, or such folders, of images in class folders; without --data, the runs on images are
left out.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# Flag -> what it was called before.
OLD_FLAGS = {
    "--pool_size": "--pool",
    "--inverse_temperature": "--tilt",
    "--autoregressive_edges": "--edges_in_turn",
    "--no-autoregressive_edges": "--no-edges_in_turn",
    "--policy_gradient_cells": "--draws",
    "--policy_gradient_weight": "--control_weight",
}
# Name of a weight, a setting or a metric, as a regular expression on its path -> what it is called now.
NEW_NAMES = {
    r"(^|\.)(cells\.\w+)\.chosen\b": r"\1\2.earlier_edges",
    r"(^|\.)edges_in_turn$": r"\1autoregressive_edges",
    r"(^|\.)obeys_": r"\1controllability_",
}
# Paths that say when, where and with which flags, not what: a regular expression that is searched for.
NOT_COMPARED = (
    r"(^|\.)(args|seconds|version|versions|commit|clean|device|command|checkpoint)(\.|$)",
    r"(^|\.)settings\.(?!held_out_checksum)",
)
# What one checkout may lack: (regular expression on the run, on the path, why).
MAY_LACK = (
    (r"^gan.*-robust$", r"^(discriminator|optimizers\.discriminator)(\.|$)", "the discriminator, not trained here"),
    (r"^gan.*-paper$", r"^reference(\.|$)", "the reference policy, not used here"),
    (r"^gan", r"^objectives\.\d+\.quantiles$", "where class boundaries lie in the ranking, saved since version 2"),
    (r"", r"^\w+_config\.\w+$", "settings of a network, saved since version 2"),
)

GAN = "--n_epochs 2 --nasbench_data {nasdata} --eval_size 60 --eval_every 2"
ROBUST = f"{GAN} --recipe robust --warmup_epochs 1 --pool_size 4000"
IMAGES = "--dataset folder --data {data} {cache} --image_size 16 --layers 1 --channels 8 --amp off --epochs 1"


class Run(NamedTuple):
    """One script with its flags, in the newest spelling; {nasdata}, {data} and {cache} are filled in.

    script: the words after python. files: what it writes that is compared, within its output folder.
    """

    script: str
    flags: str
    files: tuple[str, ...]

    @property
    def needs_images(self) -> bool:
        return "{data}" in self.flags


GAN_FILES = ("checkpoint.pt", "generator.pt", "metrics.jsonl", "samples/epoch-0002.json")
RUNS = {
    "gan-paper": Run("gan.py", f"{GAN} --recipe paper", GAN_FILES),
    "gan-robust": Run("gan.py", ROBUST, GAN_FILES),
    "gan_multiobj-paper": Run("gan_multiobj.py", f"{GAN} --recipe paper", GAN_FILES),
    "gan_multiobj-robust": Run("gan_multiobj.py", ROBUST, GAN_FILES),
    "generate_archs": Run("generate_archs.py", "--num_archs 300", ("genotypes.json",)),
    "generate_archs_multiobj": Run("generate_archs_multiobj.py", "--num_archs 100", ("genotypes.json",)),
    "build_nas_dataset": Run(
        "-m build_nas_dataset",
        f"{IMAGES} --pool_size 50 --num_images 3000 --holdout 500 --auxiliary_weight 0 --scorings 1 "
        "--score_images 200 --score_batch_size 100 --score_amp off",
        ("nasdata.jsonl", "supernet.pt", "checkpoint.pt", "metrics.jsonl"),
    ),
    "train_cifar": Run(
        "train_cifar.py",
        f"{IMAGES} --num_images 3000 --holdout 500 --auxiliary_weight 0",
        ("checkpoint.pt", "result.json", "metrics.jsonl"),
    ),
    "eval_archs": Run(
        "-m build_nas_dataset.eval_archs",
        f"{IMAGES} --num_archs 3 --num_images 2000 --holdout 500 --auxiliary_weight 0",
        ("results.json", "best.json", "metrics.jsonl"),
    ),
}
GOLDEN = "golden"
RECORDS = 256  # of the cut NAS dataset
SEED = 1997
HELPER = Path(__file__).resolve().with_name("golden_outputs.py")
RUN_HELPER = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"

Leaves = dict[str, np.ndarray | str | bool | None]  # path, names joined by dots -> value


class Failed(Exception):
    """A script of a checkout did not do what was asked. Its text says which and why."""


class Row(NamedTuple):
    """One file of one run, compared. equal: None where a run failed; difference: in words."""

    name: str
    equal: bool | None
    old: str
    new: str
    difference: str


# ------------------------------------------------------------------------------------------------- running


def start(checkout: Path, words: list[str]) -> str:
    """Run python with these words in a checkout, in one thread. Returns its output; raises Failed."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    env = {**os.environ, **threads, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise Failed(f"python {' '.join(words[:2])} in {checkout}: status {done.returncode}: {last}")
    return done.stdout


def known_flags(checkout: Path, script: str) -> set[str]:
    """The flags that a checkout's script knows, by its --help."""
    return set(re.findall(r"--(?:no-)?\w+", start(checkout, [*script.split(), "--help"])))


def spelled(flag: str, known: set[str]) -> str:
    """A flag as a checkout spells it. Raises Failed when it has it under no name of the table."""
    names = [flag, OLD_FLAGS.get(flag, flag)]
    for name in names:
        if name in known:
            return name
    raise Failed(f"there is no flag {' or '.join(dict.fromkeys(names))}: edit OLD_FLAGS")


def run_script(checkout: Path, run: Run, values: dict[str, str], folder: Path) -> dict[str, Leaves]:
    """Run a script, and read what it wrote: file -> its values."""
    known = known_flags(checkout, run.script)
    words = [word for part in run.flags.split() for word in part.format_map(values).split("\0") if word]
    words = [spelled(word, known) if word.startswith("--") else word for word in words]
    common = ["--seed", str(SEED), "--device", "cpu", "--output_dir", str(folder)]
    start(checkout, [*run.script.split(), *words, *common])
    for name in run.files:
        if not (folder / name).is_file():
            raise Failed(f"python {run.script} in {checkout} wrote no {name}")
    return {name: read(folder / name) for name in run.files}


def run_golden(checkout: Path, inputs: Path, folder: Path) -> dict[str, Leaves]:
    """Answers of a checkout's networks to the golden inputs: kind -> its values."""
    folder.mkdir(parents=True)
    out = folder / "golden.npz"
    start(checkout, ["-c", RUN_HELPER, str(HELPER), str(inputs), str(out)])
    kinds: dict[str, Leaves] = {}
    with np.load(out) as file:
        for name in file.files:
            kind, rest = name.split("/", 1)
            kinds.setdefault(kind, {})[rest] = file[name]
    return kinds


# ------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Leaves:
    """The values of a checkpoint (.pt), a JSON file or a file of JSON lines, by their paths in the newest names."""
    if path.suffix == ".pt":
        content = torch.load(path, map_location="cpu", weights_only=True)
    elif path.suffix == ".jsonl":
        content = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        content = json.loads(path.read_text())
    leaves = {}
    for name, value in flat(content):
        for old, new in NEW_NAMES.items():
            name = re.sub(old, new, name)
        if not any(re.search(pattern, name) for pattern in NOT_COMPARED):
            leaves[name] = value
    return leaves


def flat(value, path: str = "") -> Iterator[tuple[str, np.ndarray | str | bool | None]]:
    """(path, value) of all that nested dicts and lists hold; numbers, and lists of them, as arrays."""
    if isinstance(value, torch.Tensor):
        yield path, value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flat(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (list, tuple)) and value and not all(is_number(inner) for inner in value):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{path}.{i}" if path else str(i))
    elif is_number(value) or (isinstance(value, (list, tuple)) and value):
        yield path, np.asarray(value)
    else:
        yield path, value if isinstance(value, (str, bool)) or value is None else str(value)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------- comparing


def digest(leaves: Leaves) -> str:
    """SHA-256 over names, types, shapes and bytes of all values, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(leaves):
        value = leaves[name]
        if isinstance(value, np.ndarray):
            found.update(f"{name} {value.dtype} {value.shape} ".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(f"{name} {json.dumps(value)} ".encode())
    return found.hexdigest()


def compare(name: str, old: Leaves, new: Leaves) -> Row:
    """One row for two files; what only one of them has counts as a difference, unless MAY_LACK has it."""
    work, notes = name.split("/")[0], []
    for which, path, why in MAY_LACK:
        lacking = [key for key in old.keys() ^ new.keys() if re.search(path, key)] if re.search(which, work) else []
        if lacking:
            notes.append(f"{why}: {len(lacking)} values in one only")
            old = {key: value for key, value in old.items() if key not in lacking}
            new = {key: value for key, value in new.items() if key not in lacking}
    equal = (first := digest(old)) == (second := digest(new))
    if not equal:
        notes.insert(0, difference(old, new))
    return Row(name, equal, first, second, "; ".join(notes))


def difference(old: Leaves, new: Leaves) -> str:
    """What differs, in words."""
    parts = []
    for kept, other, which in ((old, new, "old"), (new, old, "new")):
        if only := kept.keys() - other.keys():
            parts.append(f"{len(only)} values only in {which} ({some(only)})")
    worst, worst_name, numbers, others = 0.0, "", 0, []
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.shape == b.shape:
            if a.dtype != b.dtype or a.tobytes() != b.tobytes():
                numbers += 1
                worst, worst_name = max((worst, worst_name), (relative_difference(a, b), name))
        elif isinstance(a, np.ndarray) or isinstance(b, np.ndarray) or a != b:
            others.append(name)
    if numbers:
        parts.append(f"{numbers} of {len(old)} values by up to {worst:.1e} of the largest number ({worst_name})")
    if others:
        parts.append(f"{len(others)} by other than numbers ({some(others)})")
    return "; ".join(parts)


def some(names: Iterable[str]) -> str:
    """The first three names."""
    first = sorted(names)
    return ", ".join(first[:3]) + (", ..." if len(first) > 3 else "")


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays of one shape, relative to the largest number in them; inf for NaN."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not a.size or np.array_equal(a, b, equal_nan=True):
        return 0.0
    gap = np.abs(a - b).max() / max(np.abs(a).max(), np.abs(b).max())
    return float(gap) if np.isfinite(gap) else float("inf")


# ------------------------------------------------------------------------------------------------- the whole


def cut(nasdata: Path, path: Path) -> None:
    """Write the first records of a NAS dataset: its header is the first line."""
    with open(nasdata) as file:
        path.write_text("".join(line for line, _ in zip(file, range(RECORDS + 1), strict=False)))


def rows_of(name: str, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Run one piece of work in both checkouts and compare what each file holds."""
    nasdata = folder / "nasdata.jsonl"
    cache = f"--cache_dir\0{args.cache_dir}" if args.cache_dir else ""
    values = {"nasdata": str(nasdata), "data": str(args.data), "cache": cache}
    found = []
    for which, checkout in (("old", args.old), ("new", args.new)):
        out = folder / which / name
        try:
            if name == GOLDEN:
                found.append(run_golden(checkout, args.old / "tests" / "data", out))
            else:
                found.append(run_script(checkout, RUNS[name], values, out))
        except Failed as error:
            return [Row(name, None, "", "", str(error))]
    old, new = found
    return [compare(f"{name}/{file}", old.get(file, {}), new.get(file, {})) for file in dict.fromkeys([*old, *new])]


def show(row: Row) -> None:
    answer = {True: "equal", False: "DIFFERS", None: "FAILED"}[row.equal]
    print(f"{row.name:43} | {answer:7} | {row.old[:12]:12} | {row.new[:12]:12} | {row.difference}", flush=True)


def main(argv: list[str] | None = None) -> int:
    names = (*RUNS, GOLDEN)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder of a checkout")
    parser.add_argument("new", type=Path, help="folder of another; or of the same, which must be equal")
    parser.add_argument("--data", type=Path, help="folder of images, for what trains on images")
    parser.add_argument("--cache_dir", type=Path, help="where decoded images are kept (default: beside them)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="write the rows as JSON too")
    args = parser.parse_args(argv)
    for name in ("old", "new", "data", "cache_dir"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.resolve())
            if name in ("old", "new") and not (path / "gan.py").is_file():
                parser.error(f"argument {name}: {path} is not a checkout of the project")
    rows, left_out = [], []
    print(f"{'name':43} | equal?  | {'digest, old':12} | {'digest, new':12} | largest difference")
    with tempfile.TemporaryDirectory() as folder:
        cut(args.old / "data" / "nasdata.jsonl", Path(folder, "nasdata.jsonl"))
        for name in args.only or names:
            if name in RUNS and RUNS[name].needs_images and args.data is None:
                left_out.append(name)
                continue
            for row in rows_of(name, args, Path(folder)):
                show(row)
                rows.append(row)
    if args.out:
        args.out.write_text(json.dumps([row._asdict() for row in rows], indent=1, allow_nan=False) + "\n")
    differ = [row.name for row in rows if not row.equal]
    print(f"{len(rows) - len(differ)} of {len(rows)} equal" + (f"; not {', '.join(differ)}" if differ else ""))
    if left_out:
        print(f"left out, since they need --data: {', '.join(left_out)}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
