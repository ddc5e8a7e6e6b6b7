"""How good are generated cells, and how far can a ranking be trusted."""

from collections.abc import Iterable, Sequence

import numpy as np

from build_nas_dataset.objectives import class_of
from build_nas_dataset.records import Record
from build_nas_dataset.statistics import bootstrap_interval
from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.cost import genotype_cost
from models.predictor import Predictor


def generation_metrics(genotypes: Sequence[Genotype | None], known: Iterable[Genotype] = ()) -> dict[str, float]:
    """Validity, uniqueness and novelty of generated genotypes, all up to isomorphism.

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


def obtained_classes(genotypes: list[Genotype | None], objectives: list[dict], predictor: Predictor) -> np.ndarray:
    """The classes that pruned genotypes are in, one for each objective (n, K); -1 for None, an invalid one.

    Of #params and MACs by exact counts; of accuracy by the predictor, whose quantile is cut into equal parts.
    objectives: as in a GAN checkpoint.
    """
    obtained = np.full((len(genotypes), len(objectives)), -1)
    valid = [i for i, genotype in enumerate(genotypes) if genotype is not None]
    if not valid:
        return obtained
    genotypes = [genotypes[i] for i in valid]
    costs = np.array([genotype_cost(genotype) for genotype in genotypes])
    predicted = predictor.quantiles(genotypes)
    for k, objective in enumerate(objectives):
        if objective["name"] == "accuracy":
            num_classes = len(objective["boundaries"]) + 1
            values, cuts = predicted[:, k], np.arange(1, num_classes) / num_classes
        else:
            values, cuts = costs[:, ("params", "macs").index(objective["name"])], objective["boundaries"]
        obtained[valid, k] = np.searchsorted(cuts, values, side="right")  # on a boundary: the class above
    return obtained


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
    drawn: dict[tuple, list], objectives: list[dict], records: list[Record], predictor: Predictor, scorer=None
) -> dict:
    """How far genotypes drawn for each combination of labels obey, and how like the real cells they are.

    An invalid genotype obeys no label. Distances are of total variation, to the real cells of the class asked for,
    the mean over the combinations.
    scorer: a SupernetScorer that has cut the classes of accuracy, in the place of the predictor.
    """
    known = {record.genotype.canonical() for record in records}
    flat = [genotype for genotypes in drawn.values() for genotype in genotypes]
    asked = np.array([labels for labels, genotypes in drawn.items() for _ in genotypes])  # (n, K)
    quality = generation_metrics(flat, known)
    result = {"drawn": len(flat), **quality, "new": quality["validity"] * quality["uniqueness"] * quality["novelty"]}
    valid = np.array([genotype is not None for genotype in flat])
    genotypes = [genotype for genotype in flat if genotype is not None]
    if not genotypes:
        return result
    obtained = obtained_classes(flat, objectives, predictor)  # (n, K)
    for k, objective in enumerate(objectives):
        entry = result[objective["name"]] = {"by": "predictor" if objective["name"] == "accuracy" else "exact count"}
        if objective["name"] == "accuracy" and scorer is not None:
            accuracies = scorer(genotypes)
            obtained[valid, k] = scorer.classes(accuracies)
            entry |= {"by": "supernet", "ceiling": scorer.ceiling, "real_80th_percentile": scorer.percentile80}
            of_class = [accuracies[asked[valid, k] == c] for c in np.unique(asked[:, k])]
            entry["mean"] = [float(values.mean()) if len(values) else None for values in of_class]  # None: all invalid
        hits = obtained[:, k] == asked[:, k]
        entry["obeys"], entry["interval"] = float(hits.mean()), bootstrap_interval(np.mean, hits)
        classes = len(objective["boundaries"]) + 1
        entry["asked_by_obtained"] = confusion(asked[valid, k], obtained[valid, k], classes).tolist()
    hits = (obtained == asked).all(1)
    result["all"] = {"obeys": float(hits.mean()), "interval": bootstrap_interval(np.mean, hits)}
    real_labels = np.array(
        [[class_of(getattr(record, o["name"]), o["boundaries"]) for o in objectives] for record in records]
    )
    distances = {"vertices": [], "ops": [], "density": []}
    for labels, genotypes in drawn.items():
        real = [record.genotype for record, own in zip(records, real_labels, strict=True) if tuple(own) == labels]
        made = [genotype for genotype in genotypes if genotype is not None]
        if real and made:
            a, b = cell_distributions(real), cell_distributions(made)
            for name in distances:
                distances[name].append(total_variation(a[name], b[name]))
    result["distance"] = {name: float(np.mean(values)) for name, values in distances.items() if values}
    return result
