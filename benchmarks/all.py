"""Run the benchmarks, and write docs/speed.md, section by section as each script ends.

    python benchmarks/all.py                             # all, on the GPU if there is one; minutes on 2 CPU cores
    python benchmarks/all.py --only gan generate
    python benchmarks/all.py --device cuda --rounds 20

Results are kept in benchmarks/results.json by script and kind of device: a run replaces those of its own kind and
leaves the others, so that docs/speed.md has columns for both. A "note" written there by hand is shown.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DATA, PAGE = FOLDER / "results.json", FOLDER.parent / "docs" / "speed.md"
SCRIPTS = ("gan", "generate", "supernet", "train_cifar", "image_stream", "startup")
TITLES = {
    "gan": "GAN: one D + G step",
    "generate": "Generation of cells",
    "supernet": "Supernet: training and scoring",
    "train_cifar": "Stand-alone training",
    "image_stream": "Images for train_imagenet.py",
    "startup": "Start-up",
}
# Column of a device's table -> key of a script's row.
COLUMNS = (
    "plain, s",
    "fast, s",
    "ratio",
    "GFLOP-eq, plain / fast",
    "share of floor",
    "peak GiB, plain / fast",
    "matmul, GFLOP/s",
)
CAPTION = "Seconds for each piece of work, the plain form against the fast one."
EXPLANATION = """\
Median of the rounds, plain and fast in turn in one process; the ratio is that of the same round, with its smallest and
largest value. GFLOP: counted in the matrix products and convolutions of the fast variant. GFLOP-eq: seconds times the
rate of a float32 matrix product measured in the same rounds, so that figures of different machines compare. Share of
floor: GFLOP over seconds times the rate of a matrix product of the same precision. Memory: on the CPU, of a process
with Python and torch; on CUDA, what the allocator takes of the device, beside the weights. What is plain: the
docstrings of benchmarks/plain_gan.py, plain_images.py. Written by `python benchmarks/all.py`; empty columns have not
been run. Where the time goes, and what was tried, is told in [speed_notes.md](speed_notes.md).
"""


def run_script(script: str, args: argparse.Namespace) -> dict:
    """Run one script, its output shown as it comes; returns its results."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        flags = ["--device", args.device, "--rounds", str(args.rounds), "--json", str(path)]
        command = [sys.executable, "-m", f"benchmarks.{script}", *flags, *(["--quick"] if args.quick else [])]
        if status := subprocess.run(command, cwd=FOLDER.parent).returncode:  # it has said why
            sys.exit(status)
        return json.loads(path.read_text())


def write(results: dict, data: Path, page: Path) -> None:
    """Write results[script][cpu or cuda] as JSON to `data`, and as tables to `page`."""
    for path, text in ((data, json.dumps(results, indent=1, allow_nan=False) + "\n"), (page, render(results))):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text)
        os.replace(temporary, path)


def render(results: dict) -> str:
    parts = ["# Measured speed\n", EXPLANATION]
    for script in SCRIPTS:
        if script not in results:
            continue
        own = results[script]
        parts.append(f"## {TITLES[script]} (`python benchmarks/{script}.py`)\n")
        parts += [f"{kind.upper()}: {about(result)}.\n" for kind, result in own.items()]
        for part, caption in (("rows", CAPTION), ("figures", "Further figures.")):
            if rows := joined(own, part):
                parts.append(f"**{TITLES[script].split(':')[0]}.** {caption}\n\n{markdown(rows)}")
    return "\n".join(parts)


def about(result: dict) -> str:
    """Where and when one kind of device was measured."""
    known = [result["device"], result["cpu"], f"torch {result['torch']}, python {result['python']}", result["date"]]
    known += [f"commit {result['commit'][:7]}"] if result.get("commit") else []
    rounds = f"{result['rounds']} rounds" + (", QUICK: tiny sizes, figures mean nothing" if result["quick"] else "")
    return "; ".join([*known, rounds]) + (f", {result['note']}" if "note" in result else "")


def joined(own: dict, part: str) -> list[dict[str, str]]:
    """One row for each piece of work or figure, with columns for both kinds of device."""
    key, columns = ("work", COLUMNS) if part == "rows" else ("what", ("value",))
    names = list(dict.fromkeys(row[key] for result in own.values() for row in result[part]))
    table = []
    for name in names:
        found = {kind: row for kind, r in own.items() for row in r[part] if row[key] == name}
        first = next(iter(found.values()))
        row = {key: name, "goal": first["goal"], **({"GFLOP": first["GFLOP"]} if part == "rows" else {})}
        for kind in ("cpu", "cuda"):
            row |= {f"{kind.upper()}: {c}": found.get(kind, {}).get(c, "") for c in columns}
        table.append(row)
    return table


def markdown(rows: list[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="SCRIPT", help=str(SCRIPTS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant runs (default: 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    where = "folder for speed.md and results.json (default: docs/speed.md, benchmarks/results.json)"
    parser.add_argument("--output_dir", type=Path, help=where)
    args = parser.parse_args(argv)
    if args.quick and (args.output_dir is None or args.output_dir.resolve() in (DATA.parent, PAGE.parent)):
        parser.error("argument --output_dir: expected another folder with --quick, whose figures mean nothing")
    path, page = (DATA, PAGE) if args.output_dir is None else (args.output_dir / DATA.name, args.output_dir / PAGE.name)
    try:  # before anything is measured
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output_dir: {error}")
    results = json.loads(path.read_text()) if path.exists() else {}
    for script in args.only:
        print(f"---- {script}", flush=True)
        result = run_script(script, args)
        results.setdefault(script, {})[result["kind"]] = {**result, "cpu": cpu_name(), "quick": args.quick}
        write(results, path, page)
    print(f"wrote {page}")


def cpu_name() -> str:
    """Model and number of cores; platform alone names the architecture only."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
