"""Statistics of rankings: Kendall's tau, and bootstrap intervals."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import kendalltau


def tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b between two scorings of the same items (ties are corrected for)."""
    return float(kendalltau(a, b).statistic)


def bootstrap_interval(statistic: Callable[..., float], *columns: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of statistic(*columns), resampling items, from 1,000 resamples.

    Resamples for which the statistic is NaN are left out, as tau's without two different values.
    """
    arrays, generator = [np.asarray(column, float) for column in columns], np.random.default_rng(0)
    n = len(arrays[0])
    values = [statistic(*(array[index] for array in arrays)) for index in generator.integers(n, size=(1000, n))]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
