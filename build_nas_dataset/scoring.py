"""The supernet in use: build it or read it, score genotypes with it (NAG paper, section 3.3).

The scores are the accuracies of the NAS dataset, and those of cells that were generated later. What makes a supernet
fast on a GPU (models/fast/replay.py) is reached through this module only.
"""

import argparse
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from build_nas_dataset.objectives import Objective, SizeRanking, shares_below, which_class
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from build_nas_dataset.statistics import tau
from genotypes import NAG_SPACE, Genotype
from models.cost import genotype_cost
from models.fast.cuda_graphs import can_record
from models.fast.replay import parameters_to_clip, record_parts
from models.supernet import Supernet, SupernetConfig
from plumbing.checkpoint_files import load_checkpoint, of_this_version
from plumbing.console import progress_bar
from plumbing.run_folder import versions
from plumbing.signals import signals
from training.cifar import load_parts
from training.image_parts import TEST_SEED
from training.images import (
    ImageSet,
    balanced_batch,
    check_classes,
    load_images,
    normalize,
    num_balanced,
    split,
)
from training.own_images import (
    asked_split,
    settle_batch_size,
    settle_holdout,
    settle_scoring,
    settle_split,
    take_unsettled,
)
from utils import autocast, user_input

STAND_ALONE = {"layers": 6, "channels": 36, "image_size": 32, "num_classes": 10}  # whose #params and MACs records have
SAVE_SECONDS = 60  # a stop during a scoring costs no more than this

# ------------------------------------------------------------------------------------------------- the supernet


def build_supernet(config: SupernetConfig, device: torch.device, cuda_graphs: bool) -> Supernet:
    """A fresh supernet on a device, its weights from torch's default generator on the CPU.

    cuda_graphs: replay what it does as CUDA graphs, where the device has these; see record_parts for what that asks.
    """
    supernet = Supernet(**asdict(config)).to(device, memory_format=torch.channels_last)
    if cuda_graphs and can_record(device):
        record_parts(supernet)
    return supernet


def clip_gradients(supernet: nn.Module, parameters: list[torch.Tensor], largest_norm: float) -> None:
    """Scale the gradients of a training step so that their norm, taken together, is at most `largest_norm`.

    parameters: all of the supernet.
    """
    nn.utils.clip_grad_norm_(parameters_to_clip(supernet, parameters), largest_norm)


def load_supernet(path: str | Path, device: torch.device) -> tuple[Supernet, argparse.Namespace]:
    """The supernet of a file supernet.pt, in eval mode, and the flags of its run. Raises ValueError for other files."""
    state = load_checkpoint(path, "supernet weights", ("supernet", "supernet_config", "settings"))
    with of_this_version(path):
        supernet = Supernet(**state["supernet_config"])
        supernet.load_state_dict(state["supernet"])
    return supernet.to(device, memory_format=torch.channels_last).eval(), argparse.Namespace(**state["settings"])


# --------------------------------------------------------------------------------------------- scores and images


@torch.inference_mode()
def score(supernet: Supernet, genotype: Genotype, batches: list[tuple], amp: str = "off") -> torch.Tensor:
    """The accuracy of one genotype, a fraction 0 to 1: a scalar tensor on the device. The supernet is left unchanged.

    batches: pairs of images x (B, 3, S, S), normalised, and labels (B,). Batch norm uses the statistics of each batch,
    so a score belongs to these images in these batches.
    amp: mixed precision, "off", "bf16" or "auto".
    """
    correct = torch.zeros((), device=batches[0][1].device)
    for x, labels in batches:
        with autocast(amp, x.device):
            logits, _ = supernet(x, genotype)
        correct += (logits.argmax(1) == labels).sum()
    return correct / sum(len(labels) for _, labels in batches)


def score_pool(
    supernet: Supernet,
    pool: list[Genotype],
    batches: list[tuple],
    scores: torch.Tensor,
    amp: str,
    seconds: dict[str, float],
    save: Callable[[], None],
    later: int = 0,
) -> None:
    """Score the genotypes of the pool whose entry in `scores` (P,) is NaN, and fill these in.

    batches, amp: as in `score`. The time that it takes is added to seconds["scoring"].
    save(): called every minute and when a signal asks for it, so that a stop loses no more, but not at the end.
    later: how many are to be scored after these, in other calls, which counts in the time left.
    """
    supernet.eval()
    todo, saved, results = scores.isnan().nonzero().flatten().tolist(), time.monotonic(), {}
    for i in progress_bar(todo, desc="scoring", later=later):
        results[i] = score(supernet, pool[i], batches, amp)
        asked = signals.stop or signals.save
        if asked or time.monotonic() - saved > SAVE_SECONDS or i == todo[-1]:
            scores[list(results)] = torch.stack(list(results.values())).cpu()
            seconds["scoring"] += time.monotonic() - saved
            saved, results = time.monotonic(), {}
            if i != todo[-1]:
                save()


def load_images_and_pool(
    args: argparse.Namespace, device: torch.device, classes: list[str] | None = None
) -> tuple[ImageSet, ImageSet, list[Genotype]]:
    """Training images, held-out images and the pool. Ends the script when the flags ask for more than there is.

    classes: the names of the classes that the images must have, those of the run to resume.
    """
    unsettled = take_unsettled(args)
    train, _ = load_parts(args, device)
    if classes:
        with user_input("--data"):
            check_classes(train, classes, args.resume)
    settle_holdout(args, train, unsettled)
    with user_input("--holdout"):
        train, held_out = split(train, args.holdout, args.seed)
        settle_scoring(args, num_balanced(held_out), unsettled)
        scoring_batches(held_out, args)  # are there enough?
    if args.num_images:
        with user_input("--num_images"):
            train = balanced_batch(train, args.num_images, args.seed)
    settle_batch_size(args, train, unsettled)
    with user_input("--pool_size"):
        return train, held_out, random_pool(args.pool_size, args.seed, NAG_SPACE, args.max_step)


def scoring_batches(held_out: ImageSet, settings: argparse.Namespace, scoring: int = 0) -> list[tuple]:
    """The class-balanced batches of images held out of the training, (x, labels) each, that score every genotype.

    settings: the flags of the supernet's run, of which score_images, score_batch_size and seed are read.
    scoring: genotypes are scored several times, once after each of the last epochs; this is the number of that time,
        from 0. Scorings 0, 1, 2, ... take disjoint images, and begin anew when all are used up.
    Raises ValueError when there are too few held-out images for one scoring.
    """
    disjoint = max(1, num_scorings(held_out, settings))
    images = balanced_batch(held_out, settings.score_images, settings.seed, scoring % disjoint)
    x = normalize(images.images, images.mean, images.std)
    size = settings.score_batch_size
    return list(zip(x.split(size), images.labels.split(size), strict=True))


def num_scorings(held_out: ImageSet, settings: argparse.Namespace) -> int:
    """The number of scorings that there are disjoint held-out images for."""
    return num_balanced(held_out) // settings.score_images


def label_checksum(images: ImageSet) -> int:
    """A checksum of the labels in their order, which tells most other sets of images from these.

    It does not tell a folder from another that has as many images in each class.
    """
    return zlib.crc32(images.labels.to("cpu", torch.int64).numpy().tobytes())


def settings_of(args: argparse.Namespace) -> dict:
    """The flags that a score depends on, which travel with the files that are passed on."""
    left_out = {"data", "cache_dir", "output_dir", "resume", "device", "cuda_graphs", "checkpoint_minutes"}
    left_out |= {"score_later", "score_only", "shard", "labels", "records", "brief_cells", "brief_flags"}
    left_out |= {"held_out_cells"}
    return {name: value for name, value in vars(args).items() if name not in left_out}


def with_images(settings: dict, data: str) -> dict:
    """The settings of a supernet's file with the folder of its images, which they leave out, and how that is split."""
    return {"test_share": None, "test_seed": TEST_SEED, **settings, "data": data}


def split_of(train: ImageSet, held_out: ImageSet) -> dict:
    """What a checkpoint remembers of the images of its run, for check_split."""
    return {
        "classes": train.classes,
        "training_images": len(train),
        "held_out_checksum": label_checksum(held_out),
    }


def check_split(train: ImageSet, held_out: ImageSet, state: dict, path: str | Path) -> None:
    """Raise ValueError when the images, or their split, are not those of a checkpoint. path: where `state` is from."""
    found = split_of(train, held_out)
    if {name: state[name] for name in found} != found:
        raise ValueError(f"the images are not those of {path}, or in another order")


# ---------------------------------------------------------------------------------------------- the NAS dataset


def write_dataset(
    path: Path, pool: list[Genotype], scores: torch.Tensor, settings: dict, train: ImageSet, seconds: dict
) -> dict:
    """Write the NAS dataset from scores (scorings, P). Returns the summary that its header holds."""
    accuracies, costs = scores.mean(0), [genotype_cost(genotype) for genotype in pool]
    summary = {
        "accuracy_mean": accuracies.mean().item(),
        "accuracy_std": accuracies.std().item(),
        "repeatability_tau": [tau(a, b) for a, b in pairwise(scores)],
        "tau_with_params": tau(accuracies, [params for params, _ in costs]),
    }
    header = {
        "search_space": NAG_SPACE.name,
        "settings": settings,
        "training_images": len(train),
        "classes": train.classes,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "summary": summary,
        "versions": versions(),
        "stand_alone": STAND_ALONE,
    }
    records = [
        Record(i, genotype, round(accuracies[i].item(), 6), *cost)
        for i, (genotype, cost) in enumerate(zip(pool, costs, strict=True))
    ]
    write_records(path, records, header)
    return summary


# --------------------------------------------------------------------------------------------- generated cells


class SupernetScorer:
    """Accuracies of generated cells by the supernet that labelled the NAS dataset, on held-out images of its own.

    The generator learned from accuracies on the images of the supernet's scorings, so cells are scored on as many
    scorings of other held-out images. Where the NAS dataset took all of them, this is said, and those of its last
    scoring are used again.

    supernet, settings: from load_supernet; the attribute settings has "data" too. data, cache_dir: the images that it
        was trained on, as in load_images.
    Raises ValueError or OSError when these are not there or are others.

        scorer = SupernetScorer(*load_supernet("supernet.pt", device), "data", None)
        scorer.cut_classes(records, objective, seed=0)
        classes = scorer.classes(genotypes)
    """

    NUM_REAL = 900  # cells of the NAS dataset that classes of accuracy are cut by

    def __init__(self, supernet: Supernet, settings: argparse.Namespace, data: str, cache_dir: str | None):
        self.supernet, device = supernet, next(supernet.parameters()).device
        source = (settings.dataset, data, settings.image_size, cache_dir, settings.skip_bad)
        settings = argparse.Namespace(**with_images(vars(settings), data))
        images, test = load_images(*source, device, asked_split(settings))
        settle_split(settings, images, test)
        self.settings = settings
        held_out = self._held_out(images, settings, data)
        scorings: Sequence[int]
        scorings = range(settings.scorings, min(2 * settings.scorings, num_scorings(held_out, settings)))
        if not scorings:
            print("supernet: the NAS dataset took all held-out images, so those of its last scoring are used again")
            scorings = [settings.scorings - 1]
        self.batches = [batch for i in scorings for batch in scoring_batches(held_out, settings, i)]
        # cut_classes scores real cells anew, so bf16 need not be emulated, slowly, where the CPU lacks it.
        self.amp = "auto" if settings.score_amp == "bf16" else settings.score_amp
        self.scored: dict[Genotype, torch.Tensor] = {}  # a genotype's accuracy is always the same

    @staticmethod
    def _held_out(images: ImageSet, settings: argparse.Namespace, data: str) -> ImageSet:
        """The images that the supernet was not trained on. Raises ValueError when `images` are not those of its run."""
        if len(images) <= settings.holdout:
            raise ValueError(f"{data} has {len(images)} images; those of the supernet's training are expected")
        _, held_out = split(images, settings.holdout, settings.seed)
        if label_checksum(held_out) != settings.held_out_checksum:  # else training images would count as held out
            raise ValueError(f"the images of {data} are not those of the supernet's training, or in another order")
        return held_out

    def __call__(self, genotypes: list[Genotype]) -> np.ndarray:
        """The accuracies of pruned genotypes, (n,) fractions 0 to 1."""
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

    def cut_classes(self, records: list[Record], objective: Objective, seed: int) -> None:
        """Cut accuracies on these images into classes, in which as many real cells are as by the NAS dataset.

        records: the NAS dataset, of which NUM_REAL are drawn by the seed. objective: accuracy; or accuracy at its size,
        for which all records are scored anew, since a genotype is compared with those that are nearest to it.
        Sets boundaries; percentile80, the accuracy that 20 % of the real cells exceed; and ceiling, the share of real
        cells whose class by these images is the one that the NAS dataset has them in. A generator whose cells are
        always in the class asked for would be measured to hit it about as often.
        """
        at_size = objective.name == "size_accuracy"
        chosen = np.random.default_rng(seed).permutation(len(records))[: None if at_size else self.NUM_REAL]
        real = [records[i].genotype for i in chosen]
        accuracies = self(real)
        self.ranking = SizeRanking(accuracies, [records[i].params for i in chosen]) if at_size else None
        known = objective.values(records)[chosen]
        self.boundaries = np.quantile(self.values(real), shares_below(known, objective.boundaries)).tolist()
        self.ceiling = float(np.mean(self.classes(real) == objective.class_of(known)))
        self.percentile80 = float(np.quantile(accuracies, 0.8))

    def values(self, genotypes: list[Genotype]) -> np.ndarray:
        """What the classes are cut by (n,): accuracies, or their places among those of real cells of their size."""
        accuracies = self(genotypes)
        if self.ranking is None:
            return accuracies
        return self.ranking.places(accuracies, [genotype_cost(genotype)[0] for genotype in genotypes])

    def classes(self, genotypes: list[Genotype]) -> np.ndarray:
        """The class of each genotype (n,), see which_class."""
        return which_class(self.values(genotypes), self.boundaries)
