"""Objectives made up for tests."""

from build_nas_dataset.objectives import Objective


def objective(name: str, *boundaries: float, minimum: float = 0.0, maximum: float = 1.0) -> Objective:
    """An objective with these boundaries between classes of equally many records."""
    classes = len(boundaries) + 1
    return Objective(name, boundaries, tuple(k / classes for k in range(1, classes)), minimum, maximum)
