"""Statistics of rankings: Kendall's tau, and bootstrap intervals."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import kendalltau


def tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b, which corrects for ties, between two scorings of the same items: -1 to 1.

    NaN where all values of a scoring are equal.
    """
    return float(kendalltau(a, b).statistic)


def bootstrap_interval(statistic: Callable[..., float], *columns: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (low, high) of statistic(*columns), from 1,000 resamples of the items.

    columns: sequences of the same length, with one value for each item, e.g. two scorings for `tau`.
    Resamples for which the statistic is NaN are left out, as tau is where no two values differ.
    """
    arrays, generator = [np.asarray(column, float) for column in columns], np.random.default_rng(0)
    n = len(arrays[0])
    values = [statistic(*(array[index] for array in arrays)) for index in generator.integers(n, size=(1000, n))]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
