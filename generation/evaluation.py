"""The evaluation of generated cells in words, and over several sampling seeds: generate_archs.py --evaluate."""

from collections.abc import Iterator, Sequence

import numpy as np

from build_nas_dataset.objectives import Objective
from build_nas_dataset.random_cells import RandomCells
from genotypes import Genotype
from utils import derive_seed


def beside_random(
    drawn: dict[tuple, list[Genotype | None]], seed: int, baseline: RandomCells
) -> dict[str, dict[tuple, list[Genotype | None]]]:
    """Generated cells, and as many random ones for each combination of labels, by what they are called.

    drawn: labels -> genotypes. seed: of the draw. baseline: the source of the random cells.
    """
    seeds = {labels: derive_seed(seed, 10**6, *labels) for labels in drawn}
    random = {labels: baseline.sample(labels, len(cells), seeds[labels]) for labels, cells in drawn.items()}
    return {"generated cells": drawn, "random cells": random}


def measures_of(result: dict, name: str = "") -> Iterator[tuple[str, float]]:
    """The measures in what evaluate_cells returns, without counts and intervals, as pairs of a name and a number.

    For example ("validity", 0.998), ("accuracy controllability", 0.87), ("distance vertices", 0.11).
    """
    for key, value in result.items():
        if isinstance(value, dict):
            yield from measures_of(value, f"{name}{key} ")
        elif key in ("mean", "mean_place"):  # accuracies, or places, by the class asked for
            title = key.replace("_", " ")
            yield from ((f"{name}{title} of class {c}", x) for c, x in enumerate(value) if x is not None)
        elif isinstance(value, float):
            yield f"{name}{key}", value


def over_sampling_seeds(results: Sequence[dict]) -> dict[str, dict]:
    """Each measure over evaluations of the same generator: name -> {"mean", "std", "values"}.

    results: of evaluate_cells, one for each sampling seed, at least two. std: the standard deviation of a sample. A
    measure that one of them lacks, since no cell was valid, is left out.
    """
    columns = [dict(measures_of(result)) for result in results]
    shared = [name for name in columns[0] if all(name in column for column in columns)]
    values = {name: [column[name] for column in columns] for name in shared}
    return {
        name: {"mean": float(np.mean(those)), "std": float(np.std(those, ddof=1)), "values": those}
        for name, those in values.items()
    }


def print_over_sampling_seeds(title: str, measures: dict[str, dict], seeds: Sequence[int], drawn: int) -> None:
    """Mean and standard deviation of each measure. drawn: how many cells an evaluation has."""
    print(f"\n{title} over the {len(seeds)} sampling seeds {seeds[0]} to {seeds[-1]}, {drawn} drawn with each:")
    for name, value in measures.items():
        print(f"  {name}: {value['mean']:.3f} +- {value['std']:.3f}")


def by_class(means: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.4f}" for value in means)


def print_evaluation(title: str, result: dict, objectives: list[Objective]) -> None:
    """One entry of evaluation.json, in words."""
    shares = ", ".join(f"{name} {result[name]:.3f}" for name in ("validity", "uniqueness", "novelty"))
    print(f"\n{title}: {result['drawn']} drawn; {shares}")
    if "all" not in result:
        return
    for objective in objectives:
        entry = result[objective.name]
        low, high = entry["interval"]
        ceiling = f", ceiling {entry['ceiling']:.3f}" if "ceiling" in entry else ""
        share = f"controllability {entry['controllability']:.3f} ({low:.3f} to {high:.3f})"
        print(f"  {objective.name} ({entry['by']}): {share}{ceiling}")
        if "mean" in entry:
            means = by_class(entry["mean"])
            print(
                f"    mean accuracy by class asked {means}; 80th percentile of real {entry['real_80th_percentile']:.4f}"
            )
        if "mean_place" in entry:
            print(f"    mean place among real cells of its size, by class asked {by_class(entry['mean_place'])}")
        for label, row in enumerate(entry["asked_by_obtained"]):
            print(f"    asked {label}: " + " ".join(f"{n:6d}" for n in row))
    low, high = result["all"]["interval"]
    print(f"  all labels at once: {result['all']['controllability']:.3f} ({low:.3f} to {high:.3f})")
    distances = ", ".join(f"{name} {value:.3f}" for name, value in result["distance"].items())
    print(f"  total-variation distance to the real cells of the class asked for: {distances}")
