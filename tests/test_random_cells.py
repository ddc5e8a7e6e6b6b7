"""build_nas_dataset/random_cells.py: the batched sampler draws what the single one does."""

import numpy as np
import pytest
import torch

from build_nas_dataset.random_cells import random_batch, random_genotype
from generation.metrics import cell_distributions, total_variation
from genotypes import NAG_SPACE, SPACES, Genotype


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_random_batches_of_all_spaces_are_pruned_valid_and_distinct(space):
    batch = random_batch(5000, torch.Generator().manual_seed(0), space)
    drawn = [Genotype(*specs, space=space) for specs in zip(*(cells.decode(space) for cells in batch), strict=True)]
    assert len(set(drawn)) == len(drawn) > 500 and all(genotype.prune() == genotype for genotype in drawn[:500])
    others, rng = {}, np.random.default_rng(0)
    while len(others) < 500:
        others[random_genotype(rng, space)] = None
    found, expected = cell_distributions(drawn[:500], space), cell_distributions(others, space)
    assert max(total_variation(found[name], expected[name]) for name in found) < 0.08


@pytest.mark.parametrize("max_vertices", [None, 6])
def test_a_random_batch_is_random_genotypes(max_vertices):
    n = 2000
    batch = random_batch(2 * n, torch.Generator().manual_seed(0), max_vertices=max_vertices)
    again = random_batch(2 * n, torch.Generator().manual_seed(0), max_vertices=max_vertices)
    assert all(torch.equal(a.adj, b.adj) and torch.equal(a.ops, b.ops) for a, b in zip(batch, again, strict=True))
    drawn = [Genotype(*specs) for specs in zip(*(cells[:n].decode() for cells in batch), strict=True)]
    assert len(set(drawn)) == n and all(genotype.prune() == genotype for genotype in drawn)
    rng = np.random.default_rng(0)
    others = list({random_genotype(rng, max_vertices=max_vertices): None for _ in range(2 * n)})[:n]
    ours, theirs = cell_distributions(drawn), cell_distributions(others)
    for name in ours:
        assert total_variation(ours[name], theirs[name]) < 0.03, name
    for name in NAG_SPACE.cells:  # normal and reduction cell alike
        first, second = ([g[name].num_vertices for g in those] for those in (drawn, others))
        assert np.mean(first) == pytest.approx(np.mean(second), abs=0.15)
