"""Score genotypes with a supernet: the accuracies of the NAS dataset, and of cells that were generated later."""

import argparse
from pathlib import Path

import torch

from genotypes import Genotype
from images import ImageSet, balanced_batch, normalize, num_balanced
from models.supernet import Supernet
from utils import autocast, load_checkpoint


@torch.inference_mode()
def score(supernet: Supernet, genotype: Genotype, batches: list[tuple], amp: str = "off") -> torch.Tensor:
    """Accuracy of one genotype on the batches, a scalar tensor on their device. The supernet is left as it was.

    Batch norm uses the statistics of each batch, so a score belongs to these images in these batches.
    """
    correct = torch.zeros((), device=batches[0][1].device)
    for x, labels in batches:
        with autocast(amp, x.device):
            logits, _ = supernet(x, genotype)
        correct += (logits.argmax(1) == labels).sum()
    return correct / sum(len(labels) for _, labels in batches)


def scoring_batches(held_out: ImageSet, settings: argparse.Namespace, scoring: int = 0) -> list[tuple]:
    """Class-balanced batches of held-out images, normalised, on the device: the same for every genotype.

    settings: the flags of the supernet's run.
    scoring: 0, 1, 2, ... take disjoint images, and begin anew when the held-out images are used up.
    Raises ValueError when there are too few held-out images for one scoring.
    """
    disjoint = max(1, num_balanced(held_out) // settings.score_images)
    images = balanced_batch(held_out, settings.score_images, settings.seed, scoring % disjoint)
    x = normalize(images.images, images.mean, images.std)
    size = settings.score_batch_size
    return list(zip(x.split(size), images.labels.split(size), strict=True))


def load_supernet(path: str | Path, device: torch.device) -> tuple[Supernet, argparse.Namespace]:
    """The supernet of a file supernet.pt, in eval mode, and the flags of its run. Raises ValueError for other files."""
    state = load_checkpoint(path, "supernet weights", ("supernet", "supernet_config", "args"))
    supernet = Supernet(**state["supernet_config"])
    supernet.load_state_dict(state["supernet"])
    return supernet.to(device, memory_format=torch.channels_last).eval(), argparse.Namespace(**state["args"])
