"""The measures, each against a case worked out by hand or a slow form of itself."""

from itertools import combinations

import numpy as np
import pytest
import torch
from small_objectives import objective

from build_nas_dataset.objectives import which_class
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.statistics import bootstrap_interval, tau
from generation.metrics import (
    cell_distributions,
    cell_statistics,
    confusion,
    generation_metrics,
    obtained_classes,
    total_variation,
)
from genotypes import NAG_SPACE, CellSpec, Genotype
from models.cost import genotype_cost
from models.predictor import Predictor

POOL = random_pool(60, seed=7)


def test_validity_uniqueness_novelty_are_shares_up_to_isomorphism():
    a, b, c = POOL[:3]
    values = generation_metrics([a, a.canonical(), b, c, None], known=[a.canonical()])
    assert values == {"validity": 4 / 5, "uniqueness": 3 / 4, "novelty": 2 / 3}
    assert generation_metrics([]) == {"validity": 0, "uniqueness": 0, "novelty": 0}


def test_classes_are_those_of_the_boundaries():
    params, macs = (sorted(column) for column in zip(*map(genotype_cost, POOL), strict=True))
    objectives = [
        objective("params", params[20], params[40]),  # values on a boundary among them
        objective("macs", macs[30]),
        objective("accuracy", 0.3, 0.4, 0.5),
    ]
    torch.manual_seed(0)
    predictor = Predictor(3, vertex_size=8)
    obtained = obtained_classes(POOL, objectives, predictor)
    for genotype, row, quantiles in zip(POOL, obtained, predictor.quantiles(POOL), strict=True):
        counts = genotype_cost(genotype)
        assert row[0] == which_class(counts[0], objectives[0].boundaries)
        assert row[1] == which_class(counts[1], objectives[1].boundaries)
        assert row[2] == min(max(int(np.floor(quantiles[2] * 4)), 0), 3)


def test_confusion_has_the_class_asked_for_in_the_row():
    assert confusion([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_distributions_agree_with_counting():
    shares = cell_distributions(POOL)
    assert all(values.sum() == pytest.approx(1) for values in shares.values())
    statistics = cell_statistics(POOL)
    assert (shares["vertices"] * np.arange(11)).sum() == pytest.approx(statistics["vertices"])
    cells = [cell for genotype in POOL for cell in genotype.cells]
    labels = [label for cell in cells for label in cell.ops]
    counts = np.array([labels.count(op) for op in NAG_SPACE.ops])
    np.testing.assert_allclose(shares["ops"], counts / counts.sum())
    tenths = [10 * cell.num_edges // (cell.num_vertices * (cell.num_vertices - 1) // 2 - 1) for cell in cells]
    counts = [tenths.count(i) for i in range(9)] + [tenths.count(9) + tenths.count(10)]
    assert min(counts[3:]) > 0 and 10 in tenths
    np.testing.assert_allclose(shares["density"], np.array(counts) / len(cells))
    assert total_variation(shares["ops"], shares["ops"]) == pytest.approx(0)
    assert total_variation(np.array([1.0, 0, 0]), np.array([0.25, 0.75, 0])) == 0.75
    bare = CellSpec([[0, 0, 1], [0, 0, 0], [0, 0, 0]], ["input0", "input1", "output"])
    assert total_variation(cell_distributions([Genotype(bare, bare)])["ops"], shares["ops"]) == 1  # no ops at all


def test_intervals_hold_the_value_and_shrink_with_n():
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    widths = []
    for n in (40, 400):
        low, high = bootstrap_interval(tau, x[:n], y[:n])
        assert low < tau(x[:n], y[:n]) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    hits = rng.random(400) < 0.9
    low, high = bootstrap_interval(np.mean, hits)
    assert low < hits.mean() < high
    low, high = bootstrap_interval(np.mean, x)
    error = x.std() / 400**0.5
    assert (low, high) == pytest.approx((x.mean() - 1.96 * error, x.mean() + 1.96 * error), abs=0.15 * error)


def test_tau_counts_concordant_pairs():
    rng = np.random.default_rng(3)
    a, b = rng.random(30), rng.random(30)
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in combinations(range(30), 2)]
    assert tau(a, b) == pytest.approx(np.mean(signs))
    low, high = bootstrap_interval(tau, a, b)
    assert -1 <= low < tau(a, b) < high <= 1
