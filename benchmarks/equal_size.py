"""Does generating gain what choosing gains? Cells of equal size: random, chosen, generated, generated and then chosen.

    python -m benchmarks.equal_size draw --generators default=data/generator.pt likelihood=RUN/generator.pt \
        --data DIR --cache_dir DIR --out docs/results/equal_size_cells.json
    python -m benchmarks.truth_set train --cells docs/results/equal_size_cells.json --seed 1 --epochs 2 \
        --results docs/results/equal_size_seed1.jsonl --dataset folder --data DIR
    python -m benchmarks.equal_size compare --cells docs/results/equal_size_cells.json \
        --trained docs/results/equal_size_seed1.jsonl --out docs/results/equal_size.json

`draw` takes 500 distinct cells of 2.5 to 2.75 million parameters from random sampling and from each generator, asked
for its highest class (of accuracy, or of accuracy at its size), and writes two groups of 48 from each: the first that
were drawn, and those that the predictor expects the highest accuracy of. With each cell stand the quantile that the
predictor expects and its accuracy by the supernet, on held-out images that no label was made with. `compare` gives the
mean of each group and its difference to the random cells, by the supernet and by stand-alone training, with 95 %
bootstrap intervals.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.truth_set import EQUAL_SIZE, commit
from build_nas_dataset.random_cells import RandomCells
from build_nas_dataset.records import read_records
from build_nas_dataset.scoring import SupernetScorer, load_supernet
from genotypes import Genotype
from models.cost import genotype_cost
from models.generator import Generator
from models.predictor import Predictor
from plumbing.files import atomic_file, to_json, write_json

CANDIDATES, GROUP = 500, 48
CPU = torch.device("cpu")


def distinct_cells(sample: Callable[[int], list[Genotype | None]], n: int, known: set[Genotype]) -> list[Genotype]:
    """The first n distinct valid genotypes of EQUAL_SIZE that are not in `known`.

    sample: gives some genotypes for each seed 0, 1, 2, ... Raises ValueError when 200 seeds do not give enough.
    """
    found, (low, high) = {}, EQUAL_SIZE
    for seed in range(200):
        for genotype in filter(None, sample(seed)):
            if low <= genotype_cost(genotype)[0] <= high and (canonical := genotype.canonical()) not in known:
                found.setdefault(canonical, genotype)
        if len(found) >= n:
            return list(found.values())[:n]
    raise ValueError(f"only {len(found)} of {n} distinct genotypes of that size were drawn")


def highest_class(source: Generator | RandomCells) -> tuple[int, ...]:
    """What is asked for: the highest class of a generator's one objective; nothing of random cells."""
    return () if isinstance(source, RandomCells) else tuple(n - 1 for n in source.config.num_classes)


def draw(args: argparse.Namespace) -> None:
    """Draw the candidates of every source, choose the groups, score them and write the file of cells."""
    known = {record.genotype.canonical() for record in read_records(args.nasbench_data)}
    sources = {"random": RandomCells()}
    for name, _, path in (given.partition("=") for given in args.generators):
        sources[name] = Generator.from_checkpoint(path, CPU)
    predictor = Predictor.from_checkpoint(args.predictor, CPU)
    scorer = SupernetScorer(*load_supernet(args.supernet, CPU), args.data, args.cache_dir)
    cells = []
    for name, source in sources.items():
        found = distinct_cells(
            lambda seed, source=source: source.sample(highest_class(source), 500, 10_000 + seed), CANDIDATES, known
        )
        quantiles = predictor.quantiles(found)[:, 0]
        groups = {name: range(GROUP), f"{name}, chosen": np.argsort(-quantiles, kind="stable")[:GROUP]}
        for group, indices in groups.items():
            accuracies = scorer([found[i] for i in indices])
            print(f"{group}: quantile {quantiles[indices].mean():.3f}, supernet {accuracies.mean():.4f}", flush=True)
            for i, accuracy in zip(indices, accuracies, strict=True):
                params, macs = genotype_cost(found[i])
                known_of_it = {"params": params, "macs": macs, "predicted_quantile": round(float(quantiles[i]), 4)}
                known_of_it["supernet_accuracy"] = round(float(accuracy), 6)
                cells.append({"group": group, **found[i].to_dict(), **known_of_it})
    with atomic_file(args.out) as file:
        file.write("[\n" + ",\n".join(map(to_json, cells)) + "\n]\n")


def interval_of_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The 95 % bootstrap interval of mean(a) - mean(b), each resampled on its own."""
    generator = np.random.default_rng(0)
    means = [values[generator.integers(len(values), size=(10_000, len(values)))].mean(1) for values in (a, b)]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return float(low), float(high)


def compare(args: argparse.Namespace) -> None:
    """The groups against the random cells; print and write the table."""
    cells = json.loads(Path(args.cells).read_text())
    columns = {
        "predicted quantile": {i: cell["predicted_quantile"] for i, cell in enumerate(cells)},
        "supernet": {i: cell["supernet_accuracy"] for i, cell in enumerate(cells)},
    }
    for path in args.trained:
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        columns[f"trained, seed {lines[0]['seed']}"] = {line["index"]: line["held_out_accuracy"] for line in lines}
    result = {"commit": commit(), "cells": args.cells}
    for name, values in columns.items():
        groups: dict[str, list[float]] = {}
        for i, cell in enumerate(cells):
            if i in values:
                groups.setdefault(cell["group"], []).append(values[i])
        arrays = {group: np.array(found) for group, found in groups.items()}
        for group, found in arrays.items():
            low, high = interval_of_difference(found, arrays["random"])
            difference = float(found.mean() - arrays["random"].mean())
            entry = {"n": len(found), "mean": float(found.mean()), "std": float(found.std(ddof=1))}
            entry |= {"difference": difference, "interval": [low, high]}
            result.setdefault(name, {})[group] = entry
            print(
                f"{name:20s} {group:22s} n {entry['n']:3d}  {entry['mean']:.4f} +- {entry['std']:.4f}"
                f"  {difference:+.4f} ({low:+.4f} to {high:+.4f})"
            )
    write_json(args.out, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing, comparing = commands.add_parser("draw"), commands.add_parser("compare")
    drawing.add_argument("--generators", nargs="+", metavar="NAME=FILE", required=True, help="checkpoints of gan.py")
    drawing.add_argument("--predictor", default="data/generator.pt", help="checkpoint with the predictor that chooses")
    drawing.add_argument("--supernet", default="data/supernet.pt")
    drawing.add_argument("--nasbench_data", default="data/nasdata.jsonl", help="whose genotypes are left out")
    drawing.add_argument("--data", required=True, help="folder of the images that the supernet was trained on")
    drawing.add_argument("--cache_dir", help="folder that keeps decoded images")
    drawing.add_argument("--out", type=Path, required=True)
    comparing.add_argument("--cells", required=True, help="file that `draw` wrote")
    comparing.add_argument("--trained", nargs="*", default=[], help="files of benchmarks.truth_set train")
    comparing.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    draw(args) if args.command == "draw" else compare(args)


if __name__ == "__main__":
    main()
