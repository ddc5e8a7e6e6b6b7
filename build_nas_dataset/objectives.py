"""Objectives (accuracy, #params, MACs) cut into classes of equally many records (NAG paper, section 3.4)."""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from build_nas_dataset.records import Record


def class_boundaries(values: Sequence[float], num_classes: int) -> list[float]:
    """The num_classes - 1 quantiles that split `values` into classes of equal size."""
    return np.quantile(np.asarray(values, float), np.arange(1, num_classes) / num_classes).tolist()


def objectives_of(records: Sequence[Record], num_classes: dict[str, int]) -> list[dict]:
    """What later stages need to know of each objective: plain data that travels with a GAN's checkpoint.

    num_classes: "accuracy", "params" or "macs" -> into how many classes it is cut.
    Raises ValueError when a class holds no record.
    """
    objectives = []
    for name, classes in num_classes.items():
        values = [getattr(record, name) for record in records]
        boundaries = class_boundaries(values, classes)
        if len({class_of(value, boundaries) for value in values}) < classes:
            raise ValueError(f"too few different values of {name} for {classes} classes")
        objectives.append({"name": name, "boundaries": boundaries, "minimum": min(values), "maximum": max(values)})
    return objectives


def class_of(value: float, boundaries: Sequence[float]) -> int:
    """Class 0 (lowest) to len(boundaries) (highest); a value on a boundary belongs to the class above."""
    return bisect_right(boundaries, value)
