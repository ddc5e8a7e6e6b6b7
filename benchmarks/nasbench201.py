"""Do generated architectures have the accuracy asked for, by the truth that a tabular benchmark knows?

    python gan.py --nasbench_data sample.jsonl --output_dir runs/k3 --n_perf_classes 3
    python -m benchmarks.nasbench201 runs/k3 runs/k5 --nasbench_data all.jsonl --out results.json

all.jsonl and sample.jsonl are NAS datasets of NAS-Bench-201 (build_nas_dataset/tabular.py writes them): the table, and
the random architectures of it that the generators were trained on. `accuracy` is the signal, what a generator is
trained on: the validation accuracy after 12 epochs. The truth is the column --truth: the test accuracy after 200.

A cell is a function: strings of the benchmark that compute the same are one cell, whose true accuracy is their mean.
The true classes are cut at the quantiles of all strings. Of each class, --max_draws genotypes are drawn. The first
--num_archs different cells among them that the generator was not trained on are judged: the share whose true class is
the class asked for is the controllability. Coverage is the share of the class's untrained cells that all the draws
reach. Beside it: the same by the signal, which tells what is lost between signal and truth; random cells; and how often
the class of the signal is the true class, over all strings and over all cells.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from build_nas_dataset.objectives import Objective, class_boundaries, which_class
from build_nas_dataset.random_cells import RandomCells
from build_nas_dataset.records import Record, read_records
from generation.metrics import confusion, generation_metrics, share_with_interval
from genotypes import Genotype
from models.generator import Generator
from plumbing.checkpoint_files import load_checkpoint
from plumbing.files import atomic_file
from plumbing.run_folder import versions
from utils import derive_seed, user_input


class Truth:
    """The classes of every cell of a table by the truth and by the signal, for a number of classes.

    of, by_signal: canonical genotype -> class. agreement: the share of strings whose class by the signal is the true
    class. agreement_of_cells: the same of cells, as the mean over the classes of the signal, since generated cells are
    judged so: equally many cells of each class that is asked for.
    """

    def __init__(self, table: list[Record], column: str, num_classes: int):
        values = {"truth": [record.columns[column] for record in table], "signal": [r.accuracy for r in table]}
        cells, classes = defaultdict(list), {}
        for i, record in enumerate(table):
            cells[record.genotype.canonical()].append(i)
        of = {}
        for name, own in values.items():
            cuts, own = class_boundaries(own, num_classes), np.array(own)
            classes[name] = which_class(own, cuts)
            of[name] = {cell: int(which_class(float(own[rows].mean()), cuts)) for cell, rows in cells.items()}
        self.of, self.by_signal = of["truth"], of["signal"]
        self.agreement = float((classes["signal"] == classes["truth"]).mean())
        asked, obtained = (np.array([labels[cell] for cell in cells]) for labels in (self.by_signal, self.of))
        shares = [(obtained[asked == label] == label).mean() for label in np.unique(asked)]
        self.agreement_of_cells = float(np.mean(shares))

    def cells(self, label: int, known: set[Genotype]) -> int:
        """How many cells of a class are not among the known ones."""
        return sum(own == label and cell not in known for cell, own in self.of.items())


def measure(source: Generator | RandomCells, truth: Truth, classes: int, known: set[Genotype], args) -> dict:
    """Controllability, quality and coverage of a source of genotypes. known: what it was trained on."""
    asked, obtained, by_signal, quality, coverage, draws = [], [], [], [], [], []
    for label in range(classes):
        drawn = source.sample((label,), args.max_draws, derive_seed(args.seed, label))
        canonical = [genotype and genotype.canonical() for genotype in drawn]
        new = [cell for cell in dict.fromkeys(canonical) if cell is not None and cell not in known]
        first = new[: args.num_archs]
        quality.append(generation_metrics(drawn[: args.num_archs], known))
        asked += [label] * len(first)
        obtained += [truth.of[cell] for cell in first]
        by_signal += [truth.by_signal[cell] for cell in first]
        coverage.append(sum(truth.of[cell] == label for cell in new) / truth.cells(label, known))
        draws.append(canonical.index(first[-1]) + 1 if first else len(drawn))
    hits = np.array(asked) == np.array(obtained)
    signal_hits = np.array(asked) == np.array(by_signal)

    def by_class(hits):
        return [float(hits[np.array(asked) == label].mean()) for label in range(classes)]

    means = {name: float(np.mean([values[name] for values in quality])) for name in quality[0]}
    return {
        **share_with_interval(hits),
        "controllability_by_class": by_class(hits),
        "controllability_by_signal": share_with_interval(signal_hits),
        "controllability_by_signal_by_class": by_class(signal_hits),
        "asked_by_obtained": confusion(asked, obtained, classes).tolist(),
        "cells_by_class": np.bincount(asked, minlength=classes).tolist(),
        "draws_by_class": draws,
        "coverage_by_class": coverage,
        **means,  # of the first --num_archs draws of each class
    }


def evaluate(path: str, table: list[Record], args: argparse.Namespace) -> dict:
    """What one trained generator does, and random cells in its place."""
    checkpoint = load_checkpoint(path, "gan", ("args", "objectives", "epoch", "predictor_tau"))
    generator = Generator.from_checkpoint(path)
    (objective,) = map(Objective.from_dict, checkpoint["objectives"])
    records = read_records(checkpoint["args"]["nasbench_data"], generator.space)
    known, classes = {record.genotype.canonical() for record in records}, objective.num_classes
    truth = Truth(table, args.truth, classes)
    names = ("recipe", "n_epochs", "batch_size", "policy_gradient_cells", "inverse_temperature", "lr", "latent_dim")
    settings = {name: checkpoint["args"].get(name) for name in (*names, "seed")}
    result = {
        "run": Path(path).name,
        "settings": settings | {"epoch": checkpoint["epoch"]},
        "classes": classes,
        "trained_on": len(records),
        "predictor_tau": checkpoint["predictor_tau"][0],
        "agreement_of_signal_and_truth": truth.agreement,
        "agreement_of_signal_and_truth_over_cells": truth.agreement_of_cells,
        "generated": measure(generator, truth, classes, known, args),
        "random": measure(RandomCells(space=generator.space), truth, classes, known, args),
    }
    agreement = f"{truth.agreement:.3f} of strings, {truth.agreement_of_cells:.3f} of cells"
    print(f"{path}: K = {classes}, agreement of signal and truth {agreement}")
    for name in ("generated", "random"):
        found = result[name]
        low, high = found["interval"]
        shares = ", ".join(f"{of} {found[of]:.3f}" for of in ("validity", "uniqueness", "novelty"))
        coverage = " ".join(f"{share:.2f}" for share in found["coverage_by_class"])
        by_signal = f"by the signal {found['controllability_by_signal']['controllability']:.3f}"
        print(
            f"  {name}: controllability {found['controllability']:.3f} ({low:.3f} to {high:.3f}), {by_signal}, {shares}"
        )
        print(f"    cells {found['cells_by_class']} in draws {found['draws_by_class']}, coverage by class {coverage}")
        for label, row in enumerate(found["asked_by_obtained"]):
            print(f"    asked {label}: " + " ".join(f"{n:5d}" for n in row))
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="runs of gan.py on accuracy alone")
    text = "NAS dataset of the whole table, with the truth as a column"
    parser.add_argument("--nasbench_data", required=True, help=text)
    parser.add_argument("--truth", default="test_accuracy", help="the column that holds the truth")
    parser.add_argument("--num_archs", type=int, default=300, help="different new cells to judge of each class")
    parser.add_argument("--max_draws", type=int, default=3000, help="genotypes drawn of each class")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    with user_input("--nasbench_data"):
        table = read_records(args.nasbench_data)
        lacking = sum(args.truth not in record.columns for record in table)
        if lacking:
            raise ValueError(f"{lacking} of {len(table)} records of {args.nasbench_data} have no column {args.truth}")
    with user_input("checkpoints"):
        results = [evaluate(path, table, args) for path in args.checkpoints]
    if args.out:
        settings = {name: getattr(args, name) for name in ("truth", "num_archs", "max_draws", "seed")}
        with atomic_file(args.out) as file:
            json.dump({"settings": settings, "versions": versions(), "results": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
