"""Objectives (accuracy, accuracy at its size, #params, MACs) cut into classes of equally many records.

    >>> records = read_records("data/nasdata.jsonl")
    >>> (accuracy,) = objectives_of(records, {"accuracy": 3})
    >>> accuracy.class_of(0.49)
    2

Class 0 is the lowest. A value on a boundary belongs to the class above. `which_class` is the one place that says so:
labels, rewards, evaluation and the targets of generate_archs.py all ask it. NAG paper, section 3.4.

"size_accuracy", accuracy at its size, is an addition to the paper. Larger cells mostly have higher accuracies, so that
"high accuracy" asks for large cells too. A genotype's accuracy at its size is the place of its accuracy among those of
the records that are nearest to it in #params, see SizeRanking, so that "high" means good for its size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from build_nas_dataset.records import Record
from genotypes import SearchSpace
from models.ops import has_network

ACCURACIES = ("accuracy", "size_accuracy")  # the objectives that say how well a genotype classifies
NEIGHBOURS = 200  # records that accuracy at its size compares a genotype with


def which_class(values, cuts: Sequence[float]):
    """The class of each value: the number of cuts, in ascending order, that it reaches or exceeds.

    values: a number, an array or a tensor; the result is a whole number, or of the same kind and shape.
    """
    if isinstance(values, Tensor):
        return torch.bucketize(values.double(), cuts_as_tensor(tuple(cuts), values.device), right=True)
    found = np.searchsorted(cuts, values, side="right")
    return found if isinstance(values, np.ndarray) else int(found)


@cache
def cuts_as_tensor(cuts: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """The cuts (C - 1,) on a device; made once, since copying numbers to a device in every step would wait for it."""
    return torch.tensor(cuts, dtype=dtype, device=device)


@dataclass(frozen=True)
class Objective:
    """What later stages need to know of an objective; plain data that goes into the checkpoints of generators.

    name: "accuracy", "params" or "macs", a column of the NAS dataset; or "size_accuracy", which is a place from 0 to 1.
    boundaries: the values between its classes, one fewer than classes.
    quantiles: the place of each boundary in the ranking of the NAS dataset, from 0 to 1: the share of its records that
        are below the boundary: i / classes for the i-th, except where many records have the same value.
    minimum, maximum: of the values in the NAS dataset.
    """

    name: str
    boundaries: tuple[float, ...]
    quantiles: tuple[float, ...]
    minimum: float
    maximum: float

    @property
    def num_classes(self) -> int:
        return len(self.boundaries) + 1

    def class_of(self, values):
        """The class of values on the objective's own scale, see which_class."""
        return which_class(values, self.boundaries)

    def class_of_quantile(self, quantiles):
        """The class of places in the NAS dataset's ranking, from 0 (lowest) to 1 (highest), see which_class."""
        return which_class(quantiles, self.quantiles)

    def is_counted(self, space: SearchSpace) -> bool:
        """Whether genotypes of a space are counted for it (#params, MACs), so that no predictor is needed."""
        return self.name not in ACCURACIES and has_network(space)

    def values(self, records: Sequence[Record]) -> np.ndarray:
        """The values of the records of a NAS dataset (N,), see values_of."""
        return values_of(records, self.name)

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "Objective":
        """The inverse of to_dict; tuples may have become lists."""
        return Objective(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})


class SizeRanking:
    """Places of accuracies among those of the genotypes of about the same size.

    The neighbours of a genotype are the records nearest to it in log #params: as many as `neighbours` says, whichever
    side they are on, and those that are just as far as the last of them. Its place is the share of the neighbours with
    a lower accuracy, plus half of the share with the same accuracy. A record is a neighbour of itself, so that among
    the n records of its size, itself included, it has the place (rank - 1/2) / n, as in the ranking of the others.

    accuracies, params (N,): of the records, at least `neighbours`.
    """

    def __init__(self, accuracies: Sequence[float], params: Sequence[int], neighbours: int = NEIGHBOURS):
        self.accuracies, self.params = np.asarray(accuracies, float), _sizes(params)
        self.neighbours = neighbours

    def places(self, accuracies: Sequence[float], params: Sequence[int]) -> np.ndarray:
        """The places, 0 lowest to 1 highest, of genotypes with these accuracies and #params (n,)."""
        sizes, places = _sizes(params).tolist(), []
        known = {size: self._neighbours_of(size) for size in set(sizes)}
        for accuracy, size in zip(accuracies, sizes, strict=True):
            below, up_to = (int(np.searchsorted(known[size], accuracy, side=side)) for side in ("left", "right"))
            places.append((below + up_to) / 2 / len(known[size]))
        return np.array(places)

    def _neighbours_of(self, size: float) -> np.ndarray:
        """The accuracies of the neighbours of genotypes of `size` #params, in ascending order."""
        ratios = np.maximum(self.params, size) / np.minimum(self.params, size)  # exp of the distance in log #params
        farthest = np.partition(ratios, self.neighbours - 1)[self.neighbours - 1]
        return np.sort(self.accuracies[ratios <= farthest])


def _sizes(params: Sequence[int]) -> np.ndarray:
    """#params (n,); genotypes without parameters count as if they had one."""
    return np.maximum(np.asarray(params, float), 1)


def values_of(records: Sequence[Record], name: str) -> np.ndarray:
    """The values of an objective, by name, of the records of a NAS dataset (N,).

    Raises ValueError when a record lacks the column, or there are too few to compare a record with those of its size.
    """
    if name != "size_accuracy":
        return _column(records, name)
    if len(records) <= NEIGHBOURS:
        raise ValueError(f"size_accuracy needs more than {NEIGHBOURS} records to compare with, got {len(records)}")
    accuracies, params = _column(records, "accuracy"), _column(records, "params")
    return SizeRanking(accuracies, params).places(accuracies, params)


def _column(records: Sequence[Record], name: str) -> np.ndarray:
    """A column of a NAS dataset (N,). Raises ValueError when a record lacks it."""
    values = [getattr(record, name) for record in records]
    if None in values:
        raise ValueError(f"the NAS dataset has no {name} for {values.count(None)} of its {len(values)} records")
    return np.array(values)


def class_boundaries(values: Sequence[float], num_classes: int) -> list[float]:
    """The num_classes - 1 quantiles that split `values` into classes of equal size."""
    return np.quantile(np.asarray(values, float), np.arange(1, num_classes) / num_classes).tolist()


def shares_below(values: Sequence[float], boundaries: Sequence[float]) -> list[float]:
    """For each boundary, the share of the values that are below it; those on it belong to the class above."""
    return (np.searchsorted(np.sort(values), boundaries, side="left") / len(values)).tolist()


def objectives_of(records: Sequence[Record], num_classes: dict[str, int]) -> list[Objective]:
    """The objectives of a NAS dataset, each cut into the number of classes that num_classes has for its name.

    Raises ValueError when a class would hold no record, or a record lacks the column.
    """
    objectives = []
    for name, classes in num_classes.items():
        values = values_of(records, name).tolist()
        boundaries = tuple(class_boundaries(values, classes))
        quantiles = tuple(shares_below(values, boundaries))
        objective = Objective(name, boundaries, quantiles, min(values), max(values))
        if len({objective.class_of(value) for value in values}) < classes:
            raise ValueError(f"too few different values of {name} for {classes} classes")
        objectives.append(objective)
    return objectives


def labels_of(records: Sequence[Record], objectives: Sequence[Objective]) -> np.ndarray:
    """The classes of every record: (records, objectives)."""
    return np.stack([objective.class_of(objective.values(records)) for objective in objectives], axis=1)
