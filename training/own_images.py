"""One's own images: a tree of class folders without a test part, which is split, and sets that are small.

    fit_batch(144, 96)     # 18: eight steps an epoch, and no image is left over

Where images are few, the values of flags that were not given follow them, and a line says so. A value that is given is
kept. Nothing here changes what is done with CIFAR and ImageNet, whose defaults are the published ones.
"""

import argparse
import os
from collections.abc import Sized
from itertools import islice
from pathlib import Path

import torch

from plumbing.flags import number
from training import distributed
from training.image_files import is_image
from training.image_parts import TEST_SEED, TEST_SHARE, holds_parts
from utils import fail, this_process, user_input

OF_A_SPLIT = ("test_share", "test_seed", "test_checksum")  # what checkpoints hold of it, among their "args"
FEW_BATCHES = 20  # with fewer images than so many batches of the default size, the size of a batch is fitted
FEWEST_STEPS, SMALLEST_BATCH = 8, 16  # of an epoch with a fitted batch; images of such a batch
FEW_DROPPED = 0.02  # share of the images that may be left over in an epoch by a fitted batch
HELD_OUT_SHARE, FEW_PER_CLASS = 5, 3  # at most one image in 5 is held out, but 3 of each class


# ------------------------------------------------------------------------------------------ training and test images


def add_split_flags(group: argparse._ActionsContainer) -> None:
    """The flags of how a plain tree of class folders is split."""
    share = (
        f"of a tree of class folders without a test part, the share of each class to test on (default: {TEST_SHARE})"
    )
    group.add_argument("--test_share", type=number(float, 0, 1, above=True), help=share)
    seed = "decides which images of such a tree those are, apart from --seed"
    group.add_argument("--test_seed", type=number(int, 0, 2**63 - 1), default=TEST_SEED, help=seed)


def check_data_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str], parts: int = 1
) -> None:
    """Check the flags about images, and note which flags a new run may settle once the images are known.

    Where --data are one's own images but --dataset was not given, that is settled now: else CIFAR-10 would be
    downloaded into them. given: the flags that were given. parts: the equal parts that a batch is cut into.
    """
    if args.resume:  # all its flags are settled
        return
    if "data" in given and "dataset" in vars(args).keys() - given:
        with user_input("--data"):
            ones_own = holds_images(Path(args.data))
        if ones_own:
            args.dataset = "folder"
            say(f"--dataset folder: {args.data} holds images in class folders")
    if args.test_share is not None and getattr(args, "dataset", "folder") != "folder":
        parser.error("argument --test_share: expected with --dataset folder; CIFAR has test images")
    if args.test_share == 1:
        parser.error("argument --test_share: expected less than 1 to train, 1 is for --evaluate")
    args.unsettled = {"flags": sorted(vars(args).keys() - given), "parts": parts}


def holds_images(data: Path) -> bool:
    """Whether a path is a .zip, or a folder of class folders or of train and test, and not one of CIFAR."""
    if not data.is_dir():
        return data.suffix.lower() == ".zip" and data.is_file()
    if any(data.glob("cifar-10*")):
        return False
    if holds_parts(data):
        return True
    folders = (entry for entry in os.scandir(data) if entry.is_dir() and not entry.name.startswith("."))
    classes = (folder for folder in folders if any(is_image(entry.name) for entry in os.scandir(folder)))
    return len(list(islice(classes, 2))) == 2


def asked_split(args: argparse.Namespace) -> tuple[float | None, int]:
    """What the flags ask of a plain tree, for load_images and open_images. Where they ask nothing, an evaluation takes
    all images.
    """
    evaluated = getattr(args, "evaluate", None) and args.test_share is None
    return 1.0 if evaluated else args.test_share, args.test_seed


def settle_split(args: argparse.Namespace, train, test) -> None:
    """Keep in the flags how a plain tree was split, or compare with what they say of an earlier run; say so.

    The flags go into config.json and checkpoints. train, test: the images of --data (ImageSet or ImageFiles).
    Raises ValueError when the flags, those of an earlier run, say that other images were tested on: some of these would
    be images that it was trained on.
    """
    split = train.plain_split
    if split is None:
        if getattr(args, "test_share", None) is not None and not getattr(args, "evaluate", None):
            raise ValueError(f"{args.data} has test images of its own, so that --test_share is of no use")
        return
    before = getattr(args, "test_checksum", None)
    if before not in (None, split.checksum) and split.share < 1:
        advice = "--test_share 1 tests on all" if getattr(args, "evaluate", None) else "give it the images as they were"
        raise ValueError(
            f"the images of {args.data} are not those that the run was started with, so that some that it was trained "
            f"on would be tested on; {advice}"
        )
    args.test_share, args.test_seed, args.test_checksum = split
    part = f"{len(test)} of {len(train) + len(test)} images are tested on, the same share of each class"
    say(f"{args.data} has no test part: {part} (--test_share {split.share:g} --test_seed {split.seed})")


# --------------------------------------------------------------------------------------- defaults that fit few images


def take_unsettled(args: argparse.Namespace) -> dict | None:
    """The flags that check_data_flags noted, {"flags": names of those that were not given, "parts"}, which then is no
    longer among the flags; None where nothing is to be settled.
    """
    unsettled = vars(args).pop("unsettled", None)
    return unsettled if getattr(args, "dataset", "folder") == "folder" else None


def settle_holdout(args: argparse.Namespace, images, unsettled: dict | None) -> None:
    """Lower a default of --holdout that is too much for the images (an ImageSet or ImageFiles), and say so."""
    if unsettled and "holdout" in unsettled["flags"] and args.holdout:
        default, args.holdout = args.holdout, fit_holdout(images.labels, len(images.classes), args.holdout)
        if args.holdout != default:
            say(f"--holdout {args.holdout}: the default, {default}, is too much of {len(images)} images")


def settle_batch_size(args: argparse.Namespace, images: Sized, unsettled: dict | None) -> None:
    """Fit a default of --batch_size to few training images; of a size that was given, say how many are left over.

    Ends the script when a batch has more images than there are.
    """
    if unsettled is not None:
        _fit_batch_size(args, images, unsettled)
    if args.batch_size > len(images):
        fail(f"--batch_size: expected at most the {len(images)} training images, got {args.batch_size}")


def _fit_batch_size(args: argparse.Namespace, images: Sized, unsettled: dict) -> None:
    """Choose the size of a batch that leaves over few images, or say how many the size that was given leaves over.

    unsettled: "flags", the names of the flags that were not given, and "parts", by which a batch has to be divisible.
    """
    default, left = args.batch_size, len(images) % args.batch_size
    if "batch_size" not in unsettled["flags"]:
        if left and default <= len(images):
            which = f"{left} of {len(images)} training images, others in every epoch"
            say(f"--batch_size {default}: {which}, are left over")
        return
    args.batch_size = fit_batch(len(images), default, unsettled["parts"])
    if args.batch_size != default:
        left_now = len(images) % args.batch_size
        steps = len(images) // args.batch_size
        say(
            f"--batch_size {args.batch_size}: an epoch has {steps} step{'s' * (steps > 1)} and leaves over "
            f"{left_now} of {len(images)} training images, the default of {default} would leave {left}"
        )


def settle_scoring(args: argparse.Namespace, available: int, unsettled: dict | None) -> None:
    """Lower the defaults of --score_images and --score_batch_size to the images that there are, and say so.

    available: class-balanced images among the held-out ones.
    """
    if unsettled and "score_images" in unsettled["flags"] and 0 < available < args.score_images:
        args.score_images = available
        if "score_batch_size" in unsettled["flags"]:
            args.score_batch_size = available
        args.score_images -= available % args.score_batch_size
        say(f"--score_images {args.score_images} --score_batch_size {args.score_batch_size}: there are no more of them")


def fit_batch(images: int, batch_size: int, parts: int = 1) -> int:
    """A size that leaves over few images in an epoch of at least FEWEST_STEPS steps, and can be cut into equal parts.

    Of the sizes up to batch_size that leave over FEW_DROPPED of the images at most, it is the one nearest to that of
    FEWEST_STEPS steps (but SMALLEST_BATCH images); if there is none, the one that leaves over the fewest. Of many
    images, or too few for any, it is batch_size itself.
    """
    if images >= FEW_BATCHES * batch_size:
        return batch_size
    wanted = min(batch_size, max(SMALLEST_BATCH, images // FEWEST_STEPS))
    sizes = [images // steps // parts * parts for steps in range(1, 2 * images // wanted + 2)]
    sizes = [size for size in (batch_size, *sizes) if 2 * parts <= size <= min(images, batch_size)]
    few = [size for size in sizes if images % size <= FEW_DROPPED * images]
    if few:
        return min(few, key=lambda size: abs(size - wanted))
    return min(sizes, key=lambda size: images % size, default=batch_size)


def fit_holdout(labels: torch.Tensor, num_classes: int, holdout: int) -> int:
    """How many of the images to hold out: `holdout`, or what fits few images, but at most half of the smallest class.

    labels: (N,) long. Each class gives as many images as any other, see images.split.
    """
    most = max(len(labels) // HELD_OUT_SHARE, FEW_PER_CLASS * num_classes)
    smallest = int(labels.bincount(minlength=num_classes).min())
    return max(1, min(holdout, most, num_classes * (smallest // 2)))


def say(line: str) -> None:
    """Print a line once, also where torchrun starts several processes and before they have joined."""
    if this_process().rank == 0 and distributed.is_main():
        print(line)
