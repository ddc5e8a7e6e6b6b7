"""build_nas_dataset/objectives.py: classes of equal sizes, and one answer to the question which class a value is in."""

import numpy as np
import pytest
import torch

from build_nas_dataset.objectives import Objective, class_boundaries, labels_of, objectives_of, which_class
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record


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
