"""What TensorBoard shows of a run beside its numbers, in gan.py and train_cifar.py: the figures of a report, as images.

matplotlib is imported when the first picture is drawn, as it takes a second.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from build_nas_dataset.objectives import Objective
from build_nas_dataset.records import Record
from generation.metrics import confusion
from genotypes import Genotype
from plumbing.run_folder import RunLog

CELLS = 4  # of each class on a contact sheet


def show_nas_dataset(log: RunLog, records: Sequence[Record], objectives: Sequence[Objective]) -> None:
    """How each objective is spread, with the boundaries of its classes; and accuracy against #params and MACs."""
    from generation.figures import cloud, histogram, pixels

    for objective in objectives:
        figure = histogram(objective.values(records), objective.name, objective.boundaries)
        log.image(f"NAS dataset/{objective.name}", pixels(figure), 0)
    accuracy = [record.accuracy for record in records]
    for name in ("params", "macs"):
        costs = [getattr(record, name) for record in records]
        if None not in costs:
            log.image(f"NAS dataset/accuracy against {name}", pixels(cloud(costs, accuracy, name, "accuracy")), 0)


def show_samples(log: RunLog, samples: Sequence[dict], epoch: int) -> None:
    """A contact sheet of the first cells of each class; the noise is the same after every epoch.

    samples: of sample_and_measure.
    """
    from generation.figures import pixels
    from generation.strips import best_of_each_class, sheet_figure

    if samples:
        entries = [(Genotype.from_dict(sample), {"labels": sample["labels"]}) for sample in samples]
        log.image("cells", pixels(sheet_figure(best_of_each_class(entries, CELLS))), epoch)


def show_confusions(log: RunLog, predictions: Path, epoch: int) -> None:
    """Which test images are taken for what. predictions: the file of write_predictions."""
    from generation.figures import heat_map, pixels

    with np.load(predictions, allow_pickle=False) as found:
        classes = found["classes"].tolist()
        counts = confusion(found["labels"], found["predicted"], len(classes))
    log.image("confusions", pixels(heat_map(counts, "class chosen", "true class", classes)), epoch)
