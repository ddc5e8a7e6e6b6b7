"""How good generated cells are: valid, different, new, what was asked for, and like real ones.

Controllability is the share of the cells drawn, invalid ones included, whose class is the class asked for.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from build_nas_dataset.objectives import ACCURACIES, Objective, labels_of
from build_nas_dataset.records import Record
from build_nas_dataset.statistics import bootstrap_interval
from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.cost import genotype_cost
from models.generator import Generator
from models.predictor import Predictor
from utils import derive_seed


def generation_metrics(genotypes: Sequence[Genotype | None], known: Iterable[Genotype] = ()) -> dict[str, float]:
    """Validity, uniqueness and novelty of generated genotypes; the same are those of equal canonical form.

    genotypes: as generated, pruned; None where a cell is not valid.
    known: canonical genotypes that are not new (the NAS dataset), best as a set.
    Returns validity (valid / all), uniqueness (distinct / valid), novelty (distinct and not known / distinct);
    a share of nothing is 0.
    """
    known = known if isinstance(known, (set, frozenset)) else set(known)
    valid = [genotype.canonical() for genotype in genotypes if genotype is not None]
    distinct = set(valid)
    return {
        "validity": len(valid) / max(len(genotypes), 1),
        "uniqueness": len(distinct) / max(len(valid), 1),
        "novelty": len(distinct - known) / max(len(distinct), 1),
    }


def cell_statistics(genotypes: Iterable[Genotype]) -> dict[str, float]:
    """Mean number of vertices and mean edge density over all cells of pruned genotypes; NaN where there are none."""
    cells = [cell for genotype in genotypes for cell in genotype.cells]
    return {
        "vertices": float(np.mean([cell.num_vertices for cell in cells])) if cells else float("nan"),
        "density": float(np.mean([cell.density for cell in cells])) if cells else float("nan"),
    }


def obtained_classes(
    genotypes: list[Genotype | None], objectives: Sequence[Objective], predictor: Predictor
) -> np.ndarray:
    """The classes that pruned genotypes are in, one for each objective (n, K); -1 for None, an invalid one.

    #params and MACs are counted; for accuracy, and where they cannot be, the predictor says which quantile a genotype
    has.
    """
    obtained = np.full((len(genotypes), len(objectives)), -1)
    valid = [i for i, genotype in enumerate(genotypes) if genotype is not None]
    if not valid:
        return obtained
    genotypes = [genotypes[i] for i in valid]
    counted = [objective.is_counted(genotypes[0].space) for objective in objectives]
    costs = [genotype_cost(genotype) for genotype in genotypes] if any(counted) else []
    predicted = predictor.quantiles(genotypes)
    for k, objective in enumerate(objectives):
        if counted[k]:
            obtained[valid, k] = objective.class_of(np.array([getattr(cost, objective.name) for cost in costs]))
        else:
            obtained[valid, k] = objective.class_of_quantile(predicted[:, k])
    return obtained


def sample_and_measure(
    generator: Generator,
    predictor: Predictor,
    objectives: Sequence[Objective],
    n: int,
    seed: int,
    known: set[Genotype],
) -> tuple[dict[str, float], list[dict]]:
    """Metrics of some n genotypes, as many for each combination of labels, and the valid ones with their labels.

    The same seed gives the same noise, however far the generator is trained: "index" tells which one a genotype is of.
    known: canonical genotypes that are not new, as for generation_metrics.
    """
    combinations = list(np.ndindex(*(objective.num_classes for objective in objectives)))
    drawn, asked = [], []
    for i, labels in enumerate(combinations):
        drawn += generator.sample(labels, -(-n // len(combinations)), derive_seed(seed, i))
        asked += [labels] * (len(drawn) - len(asked))
    valid = [(i, genotype) for i, genotype in enumerate(drawn) if genotype is not None]
    values = generation_metrics(drawn, known)
    if valid:
        values |= cell_statistics(genotype for _, genotype in valid)
    shares = (obtained_classes(drawn, objectives, predictor) == np.array(asked)).mean(0)
    values |= {f"controllability_{o.name}": share.item() for o, share in zip(objectives, shares, strict=True)}
    return values, [{**cell.to_dict(), "labels": list(map(int, asked[i])), "index": i} for i, cell in valid]


def confusion(asked: Sequence[int], obtained: Sequence[int], num_classes: int) -> np.ndarray:
    """Counts (num_classes, num_classes): rows the class asked for, columns the class obtained."""
    counts = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(counts, (np.asarray(asked), np.asarray(obtained)), 1)
    return counts


def cell_distributions(genotypes: Iterable[Genotype], space: SearchSpace = NAG_SPACE) -> dict[str, np.ndarray]:
    """Shares of vertex counts, ops and densities (in tenths) over all cells of pruned genotypes.

    Each sums to 1, but to 0 where there is nothing to count, such as ops in cells without interior vertices.
    """
    cells = [cell for genotype in genotypes for cell in genotype.cells]
    ops = [space.ops.index(op) for cell in cells for op in cell.ops if op in space.ops]
    counts = {
        "vertices": np.bincount([cell.num_vertices for cell in cells], minlength=space.max_vertices + 1),
        "ops": np.bincount(ops, minlength=len(space.ops)),
        "density": np.bincount([min(int(cell.density * 10), 9) for cell in cells], minlength=10),
    }
    return {name: values / max(values.sum(), 1) for name, values in counts.items()}


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total-variation distance of two distributions, 0 to 1: what they do not share. 1 when one of them is empty."""
    return float(1 - np.minimum(p, q).sum())


def evaluate_cells(
    drawn: dict[tuple, list], objectives: list[Objective], records: list[Record], predictor: Predictor, scorer=None
) -> dict:
    """Quality, controllability and likeness of genotypes drawn for each combination of labels.

    An invalid genotype has no class. drawn: labels -> genotypes as drawn, None where one is invalid.
    scorer: a SupernetScorer that has cut the classes of accuracy, in the place of the predictor of accuracy.
    """
    known = {record.genotype.canonical() for record in records}
    flat = [genotype for genotypes in drawn.values() for genotype in genotypes]
    asked = np.array([labels for labels, genotypes in drawn.items() for _ in genotypes])  # (n, K)
    quality = generation_metrics(flat, known)
    result = {"drawn": len(flat), **quality, "new": quality["validity"] * quality["uniqueness"] * quality["novelty"]}
    valid = np.array([genotype is not None for genotype in flat])
    if not valid.any():
        return result
    obtained = obtained_classes(flat, objectives, predictor)  # (n, K)
    for k, objective in enumerate(objectives):
        entry = {"by": "exact count" if objective.is_counted(records[0].genotype.space) else "predictor"}
        if objective.name in ACCURACIES and scorer is not None:
            those = [genotype for genotype in flat if genotype is not None]
            obtained[valid, k] = scorer.classes(those)
            entry |= by_supernet(scorer, those, asked[valid, k], np.unique(asked[:, k]))
            if objective.name == "size_accuracy":
                entry["mean_place"] = mean_by_class(scorer.values(those), asked[valid, k], np.unique(asked[:, k]))
        entry |= share_with_interval(obtained[:, k] == asked[:, k])
        counts = confusion(asked[valid, k], obtained[valid, k], objective.num_classes)
        result[objective.name] = entry | {"asked_by_obtained": counts.tolist()}
    result["all"] = share_with_interval((obtained == asked).all(1))
    result["distance"] = distances_to_real(drawn, records, labels_of(records, objectives))
    return result


def share_with_interval(hits: np.ndarray) -> dict:
    """The share of true values (n,), and its 95 % bootstrap interval."""
    return {"controllability": float(hits.mean()), "interval": bootstrap_interval(np.mean, hits)}


def by_supernet(scorer, genotypes: list[Genotype], asked: np.ndarray, classes: np.ndarray) -> dict:
    """What a supernet says of valid genotypes (n,): how far a class can be relied on, and the mean accuracy of each.

    asked: the class of accuracy asked for (n,). classes: all that were asked for.
    """
    known = {"by": "supernet", "ceiling": scorer.ceiling, "real_80th_percentile": scorer.percentile80}
    return known | {"mean": mean_by_class(scorer(genotypes), asked, classes)}


def mean_by_class(values: np.ndarray, asked: np.ndarray, classes: np.ndarray) -> list[float | None]:
    """The mean of the values (n,) of each class asked for; None where no genotype of it is valid. asked (n,)."""
    of_class = [values[asked == c] for c in classes]
    return [float(those.mean()) if len(those) else None for those in of_class]


def distances_to_real(drawn: dict[tuple, list], records: list[Record], real_labels: np.ndarray) -> dict[str, float]:
    """Total-variation distances of vertex counts, ops and densities to the real cells of the class asked for.

    The mean over the combinations of labels. real_labels: of the records (N, K).
    """
    distances = {"vertices": [], "ops": [], "density": []}
    for labels, genotypes in drawn.items():
        real = [record.genotype for record, own in zip(records, real_labels, strict=True) if tuple(own) == labels]
        made = [genotype for genotype in genotypes if genotype is not None]
        if real and made:
            a, b = (cell_distributions(genotypes, made[0].space) for genotypes in (real, made))
            for name in distances:
                distances[name].append(total_variation(a[name], b[name]))
    return {name: float(np.mean(values)) for name, values in distances.items() if values}
