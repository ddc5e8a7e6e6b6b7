"""Objectives (accuracy, #params, MACs) cut into classes of equally many records (NAG paper, section 3.4).

    >>> records = read_records("data/nasdata.jsonl")
    >>> (accuracy,) = objectives_of(records, {"accuracy": 3})
    >>> accuracy.class_of(0.49)
    2

Class 0 is the lowest. A value on a boundary belongs to the class above. `which_class` is the one place that says so:
labels, rewards, evaluation and the targets of generate_archs.py all ask it.
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

    name: "accuracy", "params" or "macs", a column of the NAS dataset.
    boundaries: the values between its classes, one fewer than classes.
    quantiles: the place of each boundary in the ranking of the NAS dataset, from 0 to 1: the share of its records that
        are below the boundary. Where many records have the same value, this is not k / classes.
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
        return self.name != "accuracy" and has_network(space)

    def of(self, record: Record) -> float:
        """The record's value."""
        return getattr(record, self.name)

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "Objective":
        """The inverse of to_dict; tuples may have become lists."""
        return Objective(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})


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
        values = [getattr(record, name) for record in records]
        if None in values:
            raise ValueError(f"the NAS dataset has no {name} for {values.count(None)} of its {len(values)} records")
        boundaries = tuple(class_boundaries(values, classes))
        quantiles = tuple(shares_below(values, boundaries))
        objective = Objective(name, boundaries, quantiles, min(values), max(values))
        if len({objective.class_of(value) for value in values}) < classes:
            raise ValueError(f"too few different values of {name} for {classes} classes")
        objectives.append(objective)
    return objectives


def labels_of(records: Sequence[Record], objectives: Sequence[Objective]) -> np.ndarray:
    """The classes of every record: (records, objectives)."""
    columns = [objective.class_of(np.array([objective.of(r) for r in records])) for objective in objectives]
    return np.stack(columns, axis=1)
