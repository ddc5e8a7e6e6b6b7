"""Score genotypes with a supernet: the accuracies of the NAS dataset, and of cells that were generated later."""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch

from build_nas_dataset.objectives import class_boundaries, which_class
from build_nas_dataset.records import Record
from genotypes import Genotype
from models.supernet import Supernet
from training.images import ImageSet, balanced_batch, load_images, normalize, num_balanced, split
from utils import autocast, load_checkpoint, of_this_version, progress_bar


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
    disjoint = max(1, num_scorings(held_out, settings))
    images = balanced_batch(held_out, settings.score_images, settings.seed, scoring % disjoint)
    x = normalize(images.images, images.mean, images.std)
    size = settings.score_batch_size
    return list(zip(x.split(size), images.labels.split(size), strict=True))


def num_scorings(held_out: ImageSet, settings: argparse.Namespace) -> int:
    """How many scorings there are disjoint images for."""
    return num_balanced(held_out) // settings.score_images


def label_checksum(images: ImageSet) -> int:
    """Of the labels in their order: tells most other datasets, but not those of as many images in the same folders."""
    return zlib.crc32(images.labels.to("cpu", torch.int64).numpy().tobytes())


def split_of(train: ImageSet, held_out: ImageSet) -> dict:
    """What a checkpoint holds of its images, for check_split."""
    return {
        "classes": train.classes,
        "training_images": len(train),
        "held_out_checksum": label_checksum(held_out),
    }


def check_split(train: ImageSet, held_out: ImageSet, state: dict, path: str | Path) -> None:
    """Raise ValueError when the images are not those of a checkpoint, or others of them are held out."""
    found = split_of(train, held_out)
    saved = {name: state.get(name, value) for name, value in found.items()}  # older checkpoints do not tell all
    if saved != found:
        raise ValueError(f"the images are not those of {path}, or in another order")


def load_supernet(path: str | Path, device: torch.device) -> tuple[Supernet, argparse.Namespace]:
    """The supernet of a file supernet.pt, in eval mode, and the flags of its run. Raises ValueError for other files."""
    state = load_checkpoint(path, "supernet weights", ("supernet", "supernet_config", "settings"))
    with of_this_version(path):
        supernet = Supernet(**state["supernet_config"])
        supernet.load_state_dict(state["supernet"])
    return supernet.to(device, memory_format=torch.channels_last).eval(), argparse.Namespace(**state["settings"])


class SupernetScorer:
    """Accuracies by a supernet, on held-out images that it was not asked about for the NAS dataset.

    Where it was asked about all of them, it says so, and takes those of the last scoring again.

    supernet, settings: from load_supernet. data, cache_dir: the images that it was trained on, as in load_images.
    Raises ValueError or OSError when these are not there or are others.
    """

    NUM_REAL = 900  # real cells that classes are cut by

    def __init__(self, supernet: Supernet, settings: argparse.Namespace, data: str, cache_dir: str | None):
        self.supernet, device = supernet, next(supernet.parameters()).device
        images, _ = load_images(settings.dataset, data, settings.image_size, cache_dir, settings.skip_bad, device)
        if len(images) <= settings.holdout:
            raise ValueError(f"{data} has {len(images)} images; those of the supernet's training are expected")
        _, held_out = split(images, settings.holdout, settings.seed)
        if label_checksum(held_out) != settings.held_out_checksum:  # else training images would count as held out
            raise ValueError(f"the images of {data} are not those of the supernet's training, or in another order")
        scorings = range(settings.scorings, min(2 * settings.scorings, num_scorings(held_out, settings)))
        if not scorings:
            print("supernet: the NAS dataset took all held-out images, so those of its last scoring are used again")
            scorings = [settings.scorings - 1]
        self.batches = [batch for i in scorings for batch in scoring_batches(held_out, settings, i)]
        # Real cells are scored anew by cut_classes, so bf16 need not be emulated, slowly, where the CPU lacks it.
        self.amp = "auto" if settings.score_amp == "bf16" else settings.score_amp
        self.scored: dict[Genotype, torch.Tensor] = {}  # a genotype's accuracy is always the same

    def __call__(self, genotypes: list[Genotype]) -> np.ndarray:
        """Accuracies (n,)."""
        new = [genotype for genotype in dict.fromkeys(genotypes) if genotype not in self.scored]
        for genotype in progress_bar(new, desc="supernet"):
            self.scored[genotype] = score(self.supernet, genotype, self.batches, self.amp)
        return torch.stack([self.scored[genotype] for genotype in genotypes]).cpu().numpy()

    def check(self, max_vertices: int) -> None:
        """Raise ValueError when cells of that many vertices cannot be scored."""
        most = self.supernet.config.max_vertices
        if max_vertices > most:
            raise ValueError(
                f"it scores cells of up to {most} vertices, --max_step of its run; {max_vertices} are wanted"
            )

    def cut_classes(self, records: list[Record], boundaries: list[float], seed: int) -> None:
        """Classes at the quantiles of real cells, scored on the same images.

        ceiling: how often a real cell is in the class, by these images, that the NAS dataset has it in; a generator
        that obeys perfectly cannot do much better.
        """
        chosen = np.random.default_rng(seed).permutation(len(records))[: self.NUM_REAL]
        real = self([records[i].genotype for i in chosen])
        self.boundaries = class_boundaries(real, len(boundaries) + 1)
        before = [which_class(records[i].accuracy, boundaries) for i in chosen]
        self.ceiling = float(np.mean(self.classes(real) == before))
        self.percentile80 = float(np.quantile(real, 0.8))

    def classes(self, accuracies: np.ndarray) -> np.ndarray:
        return which_class(accuracies, self.boundaries)
