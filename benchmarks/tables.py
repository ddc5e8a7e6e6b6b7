"""Rebuild the tables of docs/results.md and docs/speed.md from the result files that they come from.

    make tables                                  # or: python benchmarks/tables.py
    python benchmarks/tables.py --check          # writes nothing; exit status 1 where a page is not what the files give

No number of a table is typed into a page. Each table of docs/results.md stands between two marker comments, below its
caption, and is written anew from files of docs/results (or of data/):

    **Table 5.** Ablation, by the predictor, ...

    <!-- table: ablation -->
    <!-- end -->

docs/speed.md is written whole, from benchmarks/results.json, as benchmarks/all.py does. Needs no package.

How to add a table: write the caption and the two markers, put docs/results/NAME.json there, run this script. The file
holds what the table was measured with, "columns" and "rows", which are shown as they stand (`shown` in table_rows.py):

    {"what": "...", "command": "python gan_multiobj.py ...", "commit": "c555d50...", "seeds": "training seed 1997",
     "hardware": "one core of an AMD EPYC", "rebuilt": true,
     "columns": ["", "n", "both"], "digits": [null, null, 3],
     "rows": [["as it is", 1800, {"value": 0.741, "low": 0.72, "high": 0.76}]]}

"rebuilt": true says that the command writes this file. With false the page says "not rebuilt", and "why": the runs or
the hardware are no longer at hand, and the figures were copied from the page that first stated them ("recorded"). A
file of another layout, such as the one that a benchmark writes, gets a function in table_rows.py, from the contents of
its files to rows of which the first is the head, and a line in TABLES. Its "command" may be a list, or stand in each of
its "runs"; where the file has none, COMMANDS names it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    from as_module import restart

    restart()

from benchmarks import all as speed
from benchmarks.table_rows import (
    Rows,
    ablation,
    controllability,
    faults_by_script,
    nas_dataset,
    nasbench201,
    plain,
    searches,
    supernet_labels,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE, FOLDER = "docs/results.md", "docs/results"  # in the project
MARKED = re.compile(r"^<!-- table: (\S+) -->\n((?:(?!<!-- ).*\n)*)<!-- end -->$", re.MULTILINE)
CAPTION = re.compile(r"^\*\*Table (\d+)\.\*\* \S", re.MULTILINE)


class Table(NamedTuple):
    """Where the figures of a table stand, and how they become its rows.

    files: in docs/results, or in another folder of the project. rows: from their contents, in that order. A .jsonl file
    is a list of its lines.
    """

    files: tuple[str, ...]
    rows: Callable[..., Rows]


TABLES = {
    "nas_dataset": Table(("data/nasdata.jsonl", "nas_dataset.json"), nas_dataset),
    "controllability": Table(("sampling_seeds.json", "multiobj_seeds.json"), controllability),
    "supernet_seeds": Table(("supernet_seeds.json",), supernet_labels),
    "ablation": Table(("ablation.json",), ablation),
    "nasbench201": Table(("nasbench201_controllability.json",), nasbench201),
    "search_nasbench201": Table(("search_nasbench201.json",), searches),
    "search_nasbench101": Table(("search_nasbench101.json",), searches),
    "faults": Table(("faults.json",), faults_by_script),
}


TRAIN = "python -m benchmarks.truth_set train --dataset folder --data DIR --cells docs/results"
# The commands that make the files that do not say it themselves.
COMMANDS = {
    "data/nasdata.jsonl": "python -m build_nas_dataset with the flags that data/README.md names",
    "truth_seed1.jsonl": f"{TRAIN}/truth_cells.json --seed 1 --results docs/results/truth_seed1.jsonl",
    "truth_seed2.jsonl": f"{TRAIN}/truth_cells.json --seed 2 --results docs/results/truth_seed2.jsonl",
    "nasbench201_controllability.json": "python -m benchmarks.nasbench201, see docs/reproduce.md",
    "search_nasbench201.json": "python -m generation.search_benchmark, see docs/reproduce.md",
    "search_nasbench101.json": "python -m generation.search_benchmark, see docs/reproduce.md",
    "faults.json": "python -m tests.test_faults",
    "labels.json": "python -m benchmarks.label_candidates compare, see its docstring",
    "equal_size.json": "python -m benchmarks.equal_size compare, see its docstring",
    "multiobj_seeds.json": "python -m benchmarks.sampling_seeds RUN RUN --out docs/results/multiobj_seeds.json",
    "sampling_seeds.json": "python -m benchmarks.sampling_seeds RUN RUN --out docs/results/sampling_seeds.json",
    "ablation.json": "python -m benchmarks.sampling_seeds RUN RUN ... --out docs/results/ablation.json",
    "supernet_seeds.json": "python -m benchmarks.sampling_seeds RUN RUN --out docs/results/supernet_seeds.json",
}


def table_of(name: str) -> Table:
    return TABLES.get(name) or Table((f"{name}.json",), plain)


# ------------------------------------------------------------------------------------------------- files


def path_of(file: str) -> str:
    """Where a file of a Table is, in the project."""
    return file if "/" in file else f"{FOLDER}/{file}"


def read(root: Path, file: str) -> Any:
    """The content of a result file. Raises ValueError when it is not there, or not JSON."""
    path = path_of(file)
    try:
        text = (root / path).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()] if path.endswith(".jsonl") else json.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def commands_of(file: str, data: Any) -> list[str]:
    """The commands that make a result file. Raises ValueError when neither the file nor COMMANDS says them."""
    found: str | list = []
    if isinstance(data, dict):
        runs = [run["command"] for run in data.get("runs", []) if "command" in run]
        found = data.get("command") or list(dict.fromkeys(runs))
    found = [*([found] if isinstance(found, str) else found), *([COMMANDS[file]] if file in COMMANDS else [])]
    if not found and is_rebuilt(data):
        raise ValueError(f'{path_of(file)}: expected the "command" that makes it, there or in benchmarks/tables.py')
    return found


def is_rebuilt(data: Any) -> bool:
    return not isinstance(data, dict) or data.get("rebuilt", True)


def source(file: str, data: Any) -> str:
    """A sentence for below a table: where the figures come from, and whether they can be made again."""
    path = path_of(file)
    link = f"[{path}]({os.path.relpath(path, Path(PAGE).parent)})"
    if not is_rebuilt(data):
        return f"Not rebuilt: {link}; {data['why']}."
    about = data if isinstance(data, dict) else {}
    known = [f"commit {about['commit'][:7]}" if about.get("commit") else "", about.get("hardware") or ""]
    commands = " and ".join(f"`{command}`" for command in commands_of(file, data))
    return ", ".join([f"From {link}, made by {commands}", *filter(None, known)]) + "."


# ------------------------------------------------------------------------------------------------- pages


def render(name: str, root: Path) -> str:
    """What stands between the two markers of a table. Raises ValueError when a file of it is not as expected."""
    table = table_of(name)
    contents = [read(root, file) for file in table.files]
    try:
        rows = table.rows(*contents)
        sources = [source(file, data) for file, data in zip(table.files, contents, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        files = ", ".join(map(path_of, table.files))
        raise ValueError(f"table {name} cannot be made of {files}: {type(error).__name__}: {error}") from None
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body, "", *sources, ""])


def rebuilt(page: str, root: Path) -> str:
    """A page with all its tables written anew."""
    return MARKED.sub(lambda found: f"<!-- table: {found[1]} -->\n{render(found[1], root)}<!-- end -->", page)


def faults(page: str) -> list[str]:
    """What is wrong with the tables of a page, apart from their content: a line for each."""
    found = []
    outside = MARKED.sub("", page)
    if "<!-- table:" in outside or "<!-- end -->" in outside:
        found.append("a marker stands alone: expected <!-- table: NAME -->, and below it <!-- end -->, each on a line")
    for line in re.findall(r"^\|.*\n(?=\|[-:| ]+\|$)", outside, re.MULTILINE):
        found.append(f"a table is not between markers, see benchmarks/tables.py: {line.strip()[:80]}")
    for marked in MARKED.finditer(page):
        paragraph = page[: marked.start()].rstrip("\n").rsplit("\n\n", 1)[-1]
        if not CAPTION.match(paragraph):
            found.append(f"table {marked[1]}: expected a caption, **Table N.** ..., in the paragraph above its marker")
    numbers = list(map(int, CAPTION.findall(page)))
    if numbers != list(range(1, len(numbers) + 1)):
        found.append(f"captions have the numbers {numbers}, expected 1, 2, 3, ... in this order")
    return found


def pages(root: Path) -> dict[str, tuple[str, str]]:
    """Path -> (the page as it is, the page as the result files give it)."""
    results, measured = (root / PAGE).read_text(encoding="utf-8"), root / "docs" / "speed.md"
    speeds = speed.render(read(root, "benchmarks/results.json"))
    return {PAGE: (results, rebuilt(results, root)), "docs/speed.md": (measured.read_text(encoding="utf-8"), speeds)}


def list_sources(page: str, root: Path) -> None:
    """Print which commands make each result file, and which files cannot be made again."""
    files = list(dict.fromkeys(file for found in MARKED.finditer(page) for file in table_of(found[1]).files))
    for file in files:
        data = read(root, file)
        print(f"\n{path_of(file)}" + ("" if is_rebuilt(data) else f" (not rebuilt: {data['why']})"))
        for command in commands_of(file, data) or ["by which command is not known"]:
            print(f"    {command}")
    print("\nbenchmarks/results.json\n    python benchmarks/all.py")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page would change")
    args = parser.parse_args(argv)
    try:
        found = pages(root)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    wrong = [f"{PAGE}: {fault}" for fault in faults(found[PAGE][0])]
    for path, (old, new) in found.items():
        if old != new and args.check:
            wrong.append(f"{path} is not what the result files give; run `make tables`")
        elif old != new:
            temporary = root / f"{path}.tmp"
            temporary.write_text(new, encoding="utf-8")
            os.replace(temporary, root / path)
        if not args.check:
            print(f"{path}: {'written' if old != new else 'as it was'}")
    if not args.check:
        list_sources(found[PAGE][1], root)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: the pages are written by then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
