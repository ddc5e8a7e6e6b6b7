"""Compare searches on a tabular benchmark; or search a space that is too large to list by a command that scores cells.

    python -m generation.search_benchmark --space nasbench201 --table accuracies.csv.gz --output_dir runs/search
    python -m generation.search_benchmark --space nasbench101 --table nasbench_full.tfrecord --methods nag,random
    python -m generation.search_benchmark --space nag --queries 64 --output_dir runs/nag-search \\
        --evaluate_with "python -m build_nas_dataset.brief_scores --dataset folder --data DIR --epochs 2"

A search sees the signal, a validation accuracy after few epochs, of what it queries. It is judged by the figure: the
test accuracy after many epochs of the best of its queries by the signal. Methods: nag (the generator, see search.py),
random, evolution (two settings), local, predictor (NAG's predictor ranks all cells, without a generator). Repeat r of a
method has the seed --seed + r and begins at the same random cells, so that differences are taken repeat by repeat.

Writes one file of lines for each method (a repeat a line), results.json (every query), summary.json (figures at some
budgets) and regret.png. The same command goes on where it was stopped; --repeats, --methods and --workers may change.

--evaluate_with starts the command once a round, as a list of arguments and without a shell, with two paths appended: a
genotypes.json to read, a list of genotypes, and a scores.json to write, a list of as many numbers, the higher the
better. Writes genotypes.json, what was queried, best first. See docs/reproduce.md.
"""

import argparse
import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from build_nas_dataset.outside_scores import OutsideScorer, split_command
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.tabular import READERS
from generation.search import Candidates, GeneratorSearch, PredictorSearch, SearchSettings, run_search
from generation.search_report import BUDGETS, draw_regret, print_tables, summary_of
from generation.search_rivals import evolution, local_search, random_search
from generation.search_table import SearchTable
from genotypes import SPACES
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.console import progress_bar
from plumbing.files import to_json, whole_lines, write_json
from plumbing.flags import ArgumentParser, add_common_flags, number
from plumbing.locks import hold_folder
from plumbing.run_folder import output_folder, write_config
from plumbing.signals import signals
from utils import fail, shown, user_input, writes

# What --methods names -> the searches that are run for it.
METHODS = {
    "nag": ("nag",),
    "random": ("random",),
    "evolution": ("evolution-50-10", "evolution-20-10"),  # population and sample
    "local": ("local",),
    "predictor": ("predictor",),
}
KEPT = ("space", "table", "epochs", "queries", "seed", "evaluate_with")  # flags that a run that goes on must keep


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("search")
    group.add_argument("--space", default="nasbench201", choices=SPACES, help="the search space")
    group.add_argument("--table", metavar="FILE", help="the benchmark's file, as build_nas_dataset.tabular reads it")
    group.add_argument("--epochs", type=number(int, 1), help="of the signal; default: the fewest that the file has")
    group.add_argument("--methods", default=",".join(METHODS), help="searches to compare, joined by commas")
    group.add_argument("--queries", type=number(int, 2), default=300, help="evaluations of a search")
    group.add_argument("--repeats", type=number(int, 1), default=200, help="searches of each method")
    group.add_argument("--workers", type=number(int, 1), default=1, help="processes of one thread each")
    text = "instead of a table: a command that scores genotypes; one search by nag"
    group.add_argument("--evaluate_with", metavar="COMMAND", help=text)
    add_common_flags(parser)
    parser.set_defaults(seed=0)
    args = parser.parse_args(argv)
    if (args.table is None) == (args.evaluate_with is None):
        parser.error("argument --table: expected either --table or --evaluate_with")
    if args.table and args.space not in READERS:
        parser.error(f"argument --table: there are tables of {', '.join(READERS)}; use --evaluate_with")
    args.methods = args.methods.split(",")
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"argument --methods: unknown method {unknown[0]!r}; known: {', '.join(METHODS)}")
    return args


def main(args: argparse.Namespace) -> None:
    signals.listen()
    torch.set_num_threads(1)
    folder = output_folder(args)
    if args.evaluate_with:
        with user_input("--evaluate_with"):
            scorer = OutsideScorer(split_command(args.evaluate_with), folder / "rounds")
        open_folder(folder, args)
        search_with_command(scorer, folder, args)
    else:
        table = read_table(args.space, args.table, args.epochs)
        if args.queries > len(table):
            fail(f"--queries: {args.table} has {len(table)} cells, got {args.queries}")
        open_folder(folder, args)
        compare(table, folder, args)


def open_folder(folder: Path, args: argparse.Namespace) -> None:
    """Hold the run folder. Ends the script when it is of a run with other flags."""
    hold_folder(folder)
    config = folder / "config.json"
    if config.exists():
        with user_input("--output_dir"):
            before = json.loads(config.read_text())
            if not isinstance(before, dict) or not isinstance(before.get("args"), dict):
                raise ValueError(f"{config} is no record of a run")
        for name in KEPT:
            if before["args"].get(name) != getattr(args, name):
                fail(f"--{name}: the run in {folder} has {before['args'].get(name)}, got {getattr(args, name)}")
    with writes(config):
        write_config(folder, args, torch.device("cpu"))


# ------------------------------------------------------------------------------------------- tabular benchmarks


@functools.cache
def read_table(space: str, path: str, epochs: int | None) -> SearchTable:
    """The table; each process reads it once."""
    with user_input("--table"):
        return SearchTable(READERS[space](path, epochs))


@functools.cache
def candidates_of(table: SearchTable) -> Candidates:
    return Candidates(table.genotypes, table.max_vertices)


def search_rows(name: str, table: SearchTable, queries: int, seed: int) -> list[int]:
    """The rows that a search queries, in order. Every search begins at the same random rows for the same seed."""
    rng = np.random.default_rng(seed)
    if name == "random":
        return random_search(table, queries, rng)
    if name == "local":
        return local_search(table, queries, rng)
    if name.startswith("evolution"):
        population, sample = map(int, name.split("-")[1:])
        return evolution(table, queries, rng, population, sample)
    settings, rows = SearchSettings(), []
    if name == "nag":
        search = GeneratorSearch(
            table.space, table.max_vertices, seed, settings, lambda genotype: table.row_of(genotype) is not None
        )
    else:
        search = PredictorSearch(table.space, table.max_vertices, seed, settings, candidates_of(table))

    def look_up(genotypes):
        found = [table.row_of(genotype) for genotype in genotypes]
        rows.extend(found)
        return table.signal[found].tolist()

    start = [table.genotypes[row] for row in random_search(table, settings.start, rng)]
    run_search(search, start, look_up, queries)
    # where a method finds nothing new any more, the rest is random
    rest = np.setdiff1d(np.arange(len(table)), rows)
    return rows + rng.permutation(rest)[: queries - len(rows)].tolist()


def one_repeat(name: str, seed: int, where: tuple[str, str, int | None], queries: int) -> dict:
    """One search, as a line of its method's file. where: the arguments of read_table. seconds: processor time."""
    torch.set_num_threads(1)
    table = read_table(*where)
    started = time.process_time()
    rows = search_rows(name, table, queries, seed)
    return {"seed": seed, "seconds": round(time.process_time() - started, 2), "rows": rows}


def compare(table: SearchTable, folder: Path, args: argparse.Namespace) -> None:
    """Run what is not done yet, and write and print what came out."""
    names = [name for method in args.methods for name in METHODS[method]]
    done = {name: read_lines(folder / f"{name}.jsonl", table, args.queries) for name in names}
    seeds = range(args.seed, args.seed + args.repeats)
    tasks = [(name, seed) for seed in seeds for name in names if seed not in done[name]]
    for name, line in progress_bar(run_all(tasks, args), total=len(tasks), desc="searches"):
        done[name][line["seed"]] = line
        with writes(folder / f"{name}.jsonl"), open(folder / f"{name}.jsonl", "a") as file:
            file.write(to_json(line) + "\n")
    runs = {name: [done[name][seed] for seed in seeds] for name in names}
    for of_method in runs.values():
        for run in of_method:
            figure = table.figure(run["rows"])
            changes = np.flatnonzero(np.diff(figure, prepend=np.nan))
            run["best"] = [[int(i) + 1, float(figure[i])] for i in changes]  # [after so many queries, the figure]
    header = table.benchmark.header(Path(args.table).name)
    about = {**header, "queries": args.queries, "settings": asdict(SearchSettings()), "optimum": table.truth.max()}
    write_json(folder / "results.json", {**about, "runs": runs})
    figures = {name: np.array([table.figure(run["rows"]) for run in runs[name]]) for name in names}
    seconds = {name: float(np.mean([run["seconds"] for run in runs[name]])) for name in names}
    budgets = [n for n in BUDGETS if n <= args.queries] or [args.queries]
    summary = {**about, **summary_of(figures, seconds, budgets)}
    write_json(folder / "summary.json", summary)
    with writes(folder / "regret.png"):
        draw_regret(folder / "regret.png", figures, float(table.truth.max()))
    print_tables(summary)
    print(f"written to {shown(folder)}: results.json, summary.json, regret.png")


def read_lines(path: Path, table: SearchTable, queries: int) -> dict[int, dict]:
    """The repeats that are done, by seed. A last line that a kill cut off is dropped from the file."""
    lines = {}
    with user_input("--output_dir"):
        for line in whole_lines(path):
            if not is_search(line, len(table), queries):
                raise ValueError(f"{path} holds a line that is no search of {queries} queries in this table")
            lines[line["seed"]] = line
        if path.exists():
            path.write_text("".join(to_json(line) + "\n" for line in lines.values()))
    return lines


def is_search(line, size: int, queries: int) -> bool:
    """Whether a line of a method's file is of a search of so many queries in a table of so many rows."""
    if not isinstance(line, dict) or not isinstance(line.get("seed"), int):
        return False
    rows = line.get("rows")
    return isinstance(rows, list) and len(rows) == queries and all(type(r) is int and 0 <= r < size for r in rows)


def run_all(tasks: list[tuple[str, int]], args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """The lines of all tasks, as they get ready."""
    where = (args.space, args.table, args.epochs)
    if args.workers == 1:
        for name, seed in tasks:
            yield name, one_repeat(name, seed, where, args.queries)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; this one ends the others
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), signal.signal, ignore) as pool:
        futures = {pool.submit(one_repeat, name, seed, where, args.queries): name for name, seed in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            fail("--workers: a process was killed (perhaps for its memory); the same command goes on from here")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # what they were at is done again later
                process.terminate()


# ------------------------------------------------------------------------------------------ scored by a command


def search_with_command(scorer: OutsideScorer, folder: Path, args: argparse.Namespace) -> None:
    """One search by the generator, whose queries are scored by a command; goes on from the folder's checkpoint."""
    space, settings, path = SPACES[args.space], SearchSettings(), folder / "search.pt"
    settings = replace(settings, start=min(settings.start, args.queries))
    search = GeneratorSearch(space, space.max_vertices, args.seed, settings)
    if path.exists():
        with user_input("--output_dir"):
            search.load_state_dict(load_checkpoint(path, "search", ("search",))["search"])
        scorer.calls = search.rounds + 1  # one for the start, and one a round
        print(f"goes on after {len(search.genotypes)} queries")

    def after_round():
        save_checkpoint(path, "search", {"args": vars(args), "search": search.state_dict()})
        print(f"{len(search.genotypes)} queries, best score {max(search.scores):.4f}")

    def scores_of(genotypes):
        with user_input("--evaluate_with"):
            return scorer(genotypes)

    run_search(search, random_pool(settings.start, args.seed, space), scores_of, args.queries, after_round)
    order = np.argsort(-np.array(search.scores), kind="stable")
    found = [{**search.genotypes[i].to_dict(), "score": search.scores[i], "query": int(i) + 1} for i in order]
    write_json(folder / "genotypes.json", found)
    print(f"{shown(folder / 'genotypes.json')}: {len(found)} genotypes, best first")


if __name__ == "__main__":
    main(parse_args())
