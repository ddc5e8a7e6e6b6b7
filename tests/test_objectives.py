"""build_nas_dataset/objectives.py: classes of equal sizes, and one answer to the question which class a value is in."""

import argparse
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from build_nas_dataset.objectives import (
    Objective,
    SizeRanking,
    class_boundaries,
    labels_of,
    objectives_of,
    values_of,
    which_class,
)
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, read_records
from generation.targets import wanted_classes
from genotypes import NAG_SPACE


def records_with(accuracies):
    pool = random_pool(len(accuracies), seed=1)
    return [Record(i, genotype, accuracies[i], 10 * i, 0) for i, genotype in enumerate(pool)]


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5])
def test_classes_have_equal_sizes(num_classes):
    values = np.random.default_rng(0).random(1000)
    sizes = np.bincount(which_class(values, class_boundaries(values, num_classes)), minlength=num_classes)
    assert len(sizes) == num_classes
    assert np.ptp(sizes) <= 1


def test_numbers_arrays_and_tensors_get_the_same_class_and_a_boundary_belongs_above():
    cuts, values = (0.25, 0.5, 0.75), [0.0, 0.25, 0.3, 0.5, 0.74, 0.75, 1.0]
    expected = [0, 1, 1, 2, 2, 3, 3]
    assert [which_class(value, cuts) for value in values] == expected
    assert all(type(which_class(value, cuts)) is int for value in values)
    assert which_class(np.array(values), cuts).tolist() == expected
    assert which_class(torch.tensor(values), cuts).tolist() == expected


def test_labels_of_records_are_the_classes_of_their_values():
    records = records_with([0.5, 0.2, 0.4, 0.2, 0.9, 0.7])
    accuracy, params = objectives_of(records, {"accuracy": 3, "params": 2})
    assert (accuracy.minimum, accuracy.maximum, accuracy.num_classes) == (0.2, 0.9, 3)
    labels = labels_of(records, [accuracy, params])
    assert labels.tolist() == [[accuracy.class_of(r.accuracy), params.class_of(r.params)] for r in records]
    assert np.bincount(labels[:, 1]).tolist() == [3, 3]
    assert Objective.from_dict({**accuracy.to_dict(), "boundaries": list(accuracy.boundaries)}) == accuracy


def test_too_few_different_values_are_refused():
    with pytest.raises(ValueError, match="too few different values of accuracy for 3 classes"):
        objectives_of(records_with([0.5] * 6), {"accuracy": 3})


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_class_of_a_value_is_the_class_of_its_place_in_the_ranking_ties_included(classes):
    """What a predictor without error gives for a record is its mid-rank, (rank - 0.5) / records, as in its training."""
    rng = np.random.default_rng(0)
    kinds = {
        "steps of 0.01": rng.normal(0.45, 0.05, 1000).round(2),
        "tied 10, 20, 30, 25 and 15 %": np.repeat([0.2, 0.3, 0.4, 0.45, 0.5], [100, 200, 300, 250, 150]),
        "no ties": rng.random(1000),
        "shipped": np.array([record.accuracy for record in read_records("data/nasdata.jsonl")]),
    }
    for kind, values in kinds.items():
        records = [Record(i, None, value, 0, 0) for i, value in enumerate(values.tolist())]
        (accuracy,) = objectives_of(records, {"accuracy": classes})
        labels = labels_of(records, [accuracy])[:, 0]
        places = (rankdata(values) - 0.5) / len(values)
        assert (accuracy.class_of_quantile(places) == labels).all(), kind
        on_device = torch.tensor(places, dtype=torch.float32)  # as the predictor is given them
        assert accuracy.class_of_quantile(on_device).tolist() == labels.tolist(), kind
        assert accuracy.quantiles == pytest.approx([np.mean(labels < k) for k in range(1, classes)])


def test_the_median_of_tied_accuracies_is_in_the_class_that_holds_it():
    records = [Record(i, None, value, 0, 0) for i, value in enumerate([0.3] * 10 + [0.4] * 30 + [0.5] * 60)]
    (accuracy,) = objectives_of(records, {"accuracy": 3})
    assert accuracy.quantiles == (0.1, 0.4)
    for quantile, expected in ((0.05, 0), (0.2, 1), (0.35, 1), (0.5, 2), (1.0, 2)):
        args = argparse.Namespace(perf_label=None, target_acc=None, target_quantile=quantile)
        assert wanted_classes(args, accuracy) == [expected]
    assert accuracy.class_of(np.median([record.accuracy for record in records])) == 2


def place_by_definition(accuracy, size, accuracies, params, neighbours=200):
    """The place of an accuracy among the records nearest in log #params, all of them compared one by one."""
    distances = [Fraction(max(other, size), min(other, size)) for other in params]  # the same order as that of logs
    farthest = sorted(distances)[neighbours - 1]
    near = [a for a, distance in zip(accuracies, distances, strict=True) if distance <= farthest]
    return sum(1.0 if a < accuracy else 0.5 if a == accuracy else 0.0 for a in near) / len(near)


@pytest.mark.parametrize("kind", ["shipped", "many ties", "few sizes"])
def test_accuracy_at_its_size_is_the_place_among_the_200_records_nearest_in_log_params(kind):
    rng = np.random.default_rng(0)
    params, accuracies = np.exp(rng.normal(14, 1, 500)).round().astype(int).tolist(), rng.random(500).tolist()
    if kind == "shipped":
        records = read_records("data/nasdata.jsonl")
        params, accuracies = [record.params for record in records], [record.accuracy for record in records]
    if kind == "many ties":
        accuracies = np.round(accuracies, 1).tolist()
    if kind == "few sizes":  # 250 of each: all of them are as near as the 200th
        params = [1000, 5000] * 250
    records = [Record(i, None, a, p, 0) for i, (a, p) in enumerate(zip(accuracies, params, strict=True))]
    found = values_of(records, "size_accuracy")
    by_size = sorted(range(len(records)), key=params.__getitem__)
    for i in [*by_size[:3], *by_size[-3:], *range(0, len(records), max(1, len(records) // 40))]:  # both ends too
        assert found[i] == place_by_definition(accuracies[i], params[i], accuracies, params), i
    if kind == "few sizes":
        assert len({int(250 * place) for place in found[::2]}) == 250 and 0 < found.min() < 0.003
    order = rng.permutation(len(records))
    assert (values_of([records[i] for i in order], "size_accuracy") == found[order]).all()  # whatever their order
    ranking = SizeRanking(accuracies, params)
    for accuracy, size in ((0.45, 1), (0.48, 2_600_000), (0.48, 10**9), (accuracies[3], params[7])):  # of no record
        assert ranking.places([accuracy], [size]) == [place_by_definition(accuracy, size, accuracies, params)]


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_classes_of_accuracy_at_its_size_are_equally_large_at_every_size(classes):
    records = read_records("data/nasdata.jsonl")
    (at_size,) = objectives_of(records, {"size_accuracy": classes})
    labels = labels_of(records, [at_size])[:, 0]
    assert np.bincount(labels) == pytest.approx(4000 / classes, rel=0.1)
    places = (rankdata(at_size.values(records)) - 0.5) / len(records)
    assert (at_size.class_of_quantile(places) == labels).all()
    assert at_size.class_of_quantile(1.0) == classes - 1
    by_size = np.argsort([record.params for record in records])
    for part in np.array_split(labels[by_size], 10):
        assert (part == classes - 1).mean() == pytest.approx(1 / classes, abs=0.06)
    assert not at_size.is_counted(NAG_SPACE) and Objective.from_dict(at_size.to_dict()) == at_size


def test_accuracy_at_its_size_needs_sizes_and_more_records_than_are_compared():
    with pytest.raises(ValueError, match="size_accuracy needs more than 200 records to compare with, got 200"):
        values_of([Record(i, None, 0.5, 10, 10) for i in range(200)], "size_accuracy")
    with pytest.raises(ValueError, match="no params for 1 of its 300 records"):
        values_of([Record(i, None, 0.5, i or None, 10) for i in range(300)], "size_accuracy")


@pytest.mark.parametrize("name", ["generator.pt", "generator_multiobj.pt"])
def test_shipped_generators_have_the_objectives_of_the_shipped_dataset(name):
    saved = [Objective.from_dict(o) for o in torch.load(f"data/{name}", weights_only=True)["objectives"]]
    assert saved == objectives_of(read_records("data/nasdata.jsonl"), {o.name: o.num_classes for o in saved})
