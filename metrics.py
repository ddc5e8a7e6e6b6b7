"""How good are generated cells, and how far can a ranking be trusted."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import kendalltau

from genotypes import Genotype


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


def tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b between two scorings of the same items (ties are corrected for)."""
    return float(kendalltau(a, b).statistic)


def tau_interval(
    a: Sequence[float], b: Sequence[float], samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `tau`, resampling items. Resamples without two different values are left out."""
    a, b, rng = np.asarray(a), np.asarray(b), np.random.default_rng(seed)
    draws = rng.integers(len(a), size=(samples, len(a)))
    taus = [value for index in draws if not np.isnan(value := tau(a[index], b[index]))]
    low, high = np.quantile(taus, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
