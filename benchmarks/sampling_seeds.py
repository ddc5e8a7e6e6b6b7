"""Gather evaluations over sampling seeds into the result file of the controllability table of docs/results.md.

    python generate_archs_multiobj.py --num_archs 400 --evaluate --seed 1998 --sampling_seeds 8 --output_dir runs/both
    python generate_archs.py --num_archs 300 --evaluate --seed 1998 --sampling_seeds 8 --output_dir runs/accuracy
    python -m benchmarks.sampling_seeds runs/both runs/accuracy --out docs/results/sampling_seeds.json

The runs have to be of one commit and have the same versions of Python, torch and numpy. `make tables` then writes the
table anew, see benchmarks/tables.py.
"""

import argparse
import json
import time
from pathlib import Path

from benchmarks.all import cpu_name
from plumbing.checkpoint_files import load_checkpoint
from plumbing.files import from_json, write_json
from utils import user_input

DIGITS = 5  # of a share or distance
WHAT = "Controllability of generators by the predictor and by exact counts, over sampling seeds: docs/results.md"


def entry_of(config: dict, evaluation: dict) -> dict:
    """What the file says of one run, from its config.json and evaluation.json."""
    path = config["args"]["checkpoint"]
    path = str(Path(path, "generator.pt")) if Path(path).is_dir() else path
    return {
        "command": config["command"],
        "generator": path,
        "training_seed": load_checkpoint(path, "gan")["args"].get("seed"),  # None: saved before it was kept
        "sampling_seeds": evaluation["sampling_seeds"],
        "cells_of_each_sampling_seed": evaluation["random cells"]["drawn"],
        "over sampling seeds": {
            title: {name: rounded(found) for name, found in measures.items()}
            for title, measures in evaluation["over sampling seeds"].items()
        },
    }


def rounded(found: dict) -> dict:
    """A {"mean", "std", "values"} with a few digits. A number that is not defined is None, and stays so."""

    def few(value):
        return None if value is None else round(value, DIGITS)

    return {name: [few(v) for v in value] if isinstance(value, list) else few(value) for name, value in found.items()}


def gather(folders: list[Path]) -> dict:
    """The content of the result file. Raises ValueError when a run lacks something, or the runs do not go together."""
    runs, entries = [], []
    for folder in folders:
        config, evaluation = (from_json((folder / name).read_text()) for name in ("config.json", "evaluation.json"))
        if "over sampling seeds" not in evaluation:
            raise ValueError(f"{folder} has one sampling seed, expected a run with --sampling_seeds of 2 or more")
        about = {name: config.get(name) for name in ("commit", "clean", "versions", "device")}
        if runs and about != runs[0]:
            raise ValueError(f"{folder} is of another commit, version or device than {folders[0]}")
        runs.append(about)
        entries.append(entry_of(config, evaluation))
    return {
        "what": WHAT,
        "commit": runs[0]["commit"],
        "clean": runs[0]["clean"],
        "date": time.strftime("%Y-%m-%d"),
        "hardware": f"{cpu_name()}; {runs[0]['device']}",
        "versions": {name: version for name, version in runs[0]["versions"].items() if version},
        "rebuilt": True,
        "runs": entries,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of generate_archs.py --evaluate")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    with user_input("runs"):
        found = gather(args.runs)
    write_json(args.out, found)
    print(f"wrote {args.out}: {json.dumps([run['command'] for run in found['runs']], indent=1)}")


if __name__ == "__main__":
    main()
