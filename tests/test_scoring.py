"""scoring.py: which images genotypes are scored on, and the classes of what a supernet finds."""

import argparse
import math

import numpy as np
import pytest
import torch
from small_objectives import objective

from build_nas_dataset import scoring
from build_nas_dataset.objectives import objectives_of
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record
from build_nas_dataset.scoring import SupernetScorer, label_checksum, scoring_batches
from models.cost import genotype_cost
from models.supernet import Supernet
from training.images import ImageSet, split

SETTINGS = argparse.Namespace(
    dataset="folder", image_size=8, skip_bad=False, seed=5, holdout=26, scorings=2,
    score_images=4, score_batch_size=2, score_amp="off",
)  # fmt: skip


def numbered_images(n: int) -> ImageSet:
    """Images of two classes; all pixels of image k are k."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 8, 8)
    return ImageSet(pixels, torch.arange(n) % 2, ["even", "odd"], (0.5,) * 3, (0.25,) * 3)


def numbers(batches: list) -> list[int]:
    """Which of the images are in normalised batches."""
    return [round(255 * (0.5 + 0.25 * image.mean().item())) for x, _ in batches for image in x]


def test_scorings_take_other_images_until_all_are_used_up():
    """26 held-out images, 13 of each class, are 6 scorings of 2 + 2."""
    held_out = numbered_images(26)
    taken = [numbers(scoring_batches(held_out, SETTINGS, k)) for k in range(6)]
    assert all(len(images) == 4 and sum(k % 2 for k in images) == 2 for images in taken)
    assert len({k for images in taken for k in images}) == 24
    assert numbers(scoring_batches(held_out, SETTINGS, 6)) == taken[0]
    for x, labels in scoring_batches(held_out, SETTINGS):
        assert len(x) == 2 and labels.tolist() == [k % 2 for k in numbers([(x, labels)])]
        assert x.std((1, 2, 3)).max() == 0


@pytest.fixture
def make_scorer(monkeypatch):
    """A function from a number of scorings to the scorer of a supernet; of 60 images, 26 are held out."""
    images = numbered_images(60)
    monkeypatch.setattr(scoring, "load_images", lambda *args: (images, images))

    def make(scorings: int) -> SupernetScorer:
        checksum = label_checksum(split(images, SETTINGS.holdout, SETTINGS.seed)[1])
        settings = argparse.Namespace(**{**vars(SETTINGS), "scorings": scorings, "held_out_checksum": checksum})
        return SupernetScorer(Supernet(2, 1, 4, auxiliary=False).eval(), settings, "images", None)

    return make


def test_generated_cells_are_scored_on_held_out_images_that_did_not_make_the_labels(make_scorer, capsys):
    _, held_out = split(numbered_images(60), SETTINGS.holdout, SETTINGS.seed)
    taken = [numbers(scoring_batches(held_out, SETTINGS, i)) for i in range(6)]
    assert {k for images in taken for k in images} < set(held_out.images[:, 0, 0, 0].tolist())
    assert numbers(make_scorer(2).batches) == taken[2] + taken[3]
    assert numbers(make_scorer(5).batches) == taken[5]
    assert "took all" not in capsys.readouterr().out
    assert numbers(make_scorer(6).batches) == taken[5]  # none are left
    assert "the NAS dataset took all held-out images" in capsys.readouterr().out


def test_classes_are_cut_at_the_quantiles_of_real_cells_and_the_ceiling_is_their_agreement(make_scorer):
    """9 cells, whose accuracies by the NAS dataset are in order; on new images two cells have changed places.

    The classes have as many of these cells as by the NAS dataset: 2, 3 and 4.
    """
    scorer, pool = make_scorer(2), random_pool(9, seed=0)
    records = [Record(i, genotype, 0.1 * i, 1, 1) for i, genotype in enumerate(pool)]
    now = [0.0, 0.125, 0.25, 0.375, 0.75, 0.625, 0.5, 0.875, 1.0]  # cells 4 and 6 have changed places
    scorer.scored = {genotype: torch.tensor(value) for genotype, value in zip(pool, now, strict=True)}
    assert scorer(pool[::-1]).tolist() == now[::-1]
    scorer.cut_classes(records, objective("accuracy", 0.15, 0.5), seed=0)
    assert scorer.boundaries == pytest.approx([2 / 9, 5 / 9])
    assert scorer.percentile80 == pytest.approx(np.sort(now)[6] * 0.6 + np.sort(now)[7] * 0.4)
    # by the NAS dataset        0, 0, 1, 1, 1, 2, 2, 2, 2
    # by the new images         0, 0, 1, 1, 2, 2, 1, 2, 2
    assert scorer.ceiling == pytest.approx(7 / 9)
    scorer.cut_classes(records, objective("accuracy", 0.5), seed=0)
    assert scorer.boundaries == pytest.approx([5 / 9])
    new = random_pool(3, seed=1)
    values = (0.5555, 5 / 9 + 1e-6, 0.5556)
    scorer.scored |= {genotype: torch.tensor(value) for genotype, value in zip(new, values, strict=True)}
    assert scorer.classes(new).tolist() == [0, 1, 1]


def test_at_its_size_a_generated_cell_is_ranked_among_real_cells_of_its_size_on_the_same_images(make_scorer):
    """Accuracies by the supernet that rise with #params: large cells are not better than small ones at their size."""
    scorer, pool = make_scorer(2), random_pool(450, seed=0)
    params = [genotype_cost(genotype)[0] for genotype in pool]
    noise = np.random.default_rng(0).permutation(450) / 450
    now = (np.log(params) * 0.03 + noise / 1000).astype(np.float32)
    records = [Record(i, g, float(now[i]) + 0.1, params[i], 1) for i, g in enumerate(pool)]
    scorer.scored = {genotype: torch.tensor(value) for genotype, value in zip(pool, now, strict=True)}
    (at_size,) = objectives_of(records, {"size_accuracy": 5})
    scorer.cut_classes(records, at_size, seed=0)
    assert scorer.ceiling == 1
    size = sorted(params)[225]
    near = sorted(range(450), key=lambda i: abs(math.log(params[i]) - math.log(size)))[:200]
    asked = pool[params.index(size)]
    own = now[params.index(size)]
    expected = float(sum((now[i] < own) + 0.5 * (now[i] == own) for i in near) / 200)
    assert scorer.values([asked]) == pytest.approx([expected])
    assert scorer.classes([asked]).tolist() == [at_size.class_of(expected)]


@pytest.mark.parametrize("sizes", [(10, 30, 60), (60, 30, 10), (1, 1, 98)])
def test_a_supernet_that_agrees_with_the_nas_dataset_is_cut_into_its_classes_ties_included(make_scorer, sizes):
    scorer, pool = make_scorer(2), random_pool(100, seed=0)
    accuracies = np.repeat([0.3, 0.4, 0.5], sizes)
    records = [Record(i, genotype, float(accuracies[i]), 1, 1) for i, genotype in enumerate(pool)]
    scorer.scored = {genotype: torch.tensor(a) for genotype, a in zip(pool, accuracies - 0.1, strict=True)}
    scorer.cut_classes(records, objective("accuracy", 0.4, 0.5), seed=0)
    assert scorer.ceiling == 1
    assert scorer.classes(pool).tolist() == np.repeat([0, 1, 2], sizes).tolist()
