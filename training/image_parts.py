"""The training and the test part of a dataset on disk: two folders or .zip files, or one that is split into both.

    train, test = list_parts(Path("DIR"))     # names only, see image_files.Part

DIR holds train and test (or val, valid, validation), each a folder of class folders or a .zip of one. Or it is such a
folder or .zip itself, a plain tree: then a share of the images of each class is split off to test on, by a seed.
Whatever is wrong with a file or a folder is a ValueError or OSError of one line that names it.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import torch

from training.image_decoding import first_of, shown_text
from training.image_files import Part, PlainSplit, as_bytes, list_part

TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "val", "valid", "validation")  # the first that is there is taken
PART_LIKE = {*TRAIN_NAMES, *TEST_NAMES, "training", "testing"}  # of no class, in lower case
TEST_SHARE, TEST_SEED = 0.2, 1997  # of a plain tree, unless others are asked for


def list_parts(data: Path, test_share: float | None = None, test_seed: int = TEST_SEED) -> tuple[Part, Part]:
    """The training and the test part of `data`, a folder or, as a plain tree, also a .zip.

    test_share, test_seed: of a plain tree, the share of each class to test on (None: TEST_SHARE), and what decides
    which images those are.
    Raises ValueError when the classes of the parts differ, when a class has no image in one of them, or when a file is
    in both, by a link: it would be tested on what it was trained on.
    """
    if data.suffix.lower() == ".zip" and data.is_file():
        return split_off(replace(list_part(data), plain=True), test_share or TEST_SHARE, test_seed)
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder: expected one that holds class folders, or train and test")
    if not holds_parts(data):
        return split_off(replace(list_part(data), plain=True), test_share or TEST_SHARE, test_seed)
    of_train, of_test = {}, {}
    train = list_part(_find_part(data, TRAIN_NAMES), of_train)
    test = list_part(_find_part(data, TEST_NAMES), of_test)
    if both := of_train.keys() & of_test.keys():
        first, second = min((of_train[file], of_test[file]) for file in both)
        raise ValueError(
            f"{data}: {train.path.name}/{shown_text(first)}".rstrip("/")
            + f" and {test.path.name}/{shown_text(second)}".rstrip("/")
            + " are the same file, by a link: expected other images to test on than to train"
        )
    if train.classes != test.classes:
        only = [(a.path, sorted(set(a.classes) - set(b.classes))) for a, b in ((train, test), (test, train))]
        differing = "; ".join(f"only in {path}: {first_of(names)}" for path, names in only if names)
        raise ValueError(f"{data}: train and test must have the same classes, but {differing}")
    return train, test


def holds_parts(data: Path) -> bool:
    """Whether a folder holds a training or a test part; else it is a plain tree."""
    return any((data / name).is_dir() or (data / f"{name}.zip").is_file() for name in TRAIN_NAMES + TEST_NAMES)


def _find_part(data: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (data / name).is_dir():
            return data / name
        if (data / f"{name}.zip").is_file():
            return data / f"{name}.zip"
    raise ValueError(f"{data} holds no {' or '.join(names)}: expected a folder of class folders, or a .zip of them")


def split_off(whole: Part, share: float, seed: int) -> tuple[Part, Part]:
    """Split a plain tree: `share` of the images of each class, rounded, are the test part, and the rest is trained on.

    A share of 1 leaves nothing to train on, for evaluations on all of the images.
    Raises ValueError when a class has no image to test on or, with a lower share, to train on, and when class folders
    have names like "Testing", which are the parts of a dataset that its classes are in.
    """
    if parts := [name for name in whole.classes if name.lower() in PART_LIKE]:
        raise ValueError(
            f"{whole.path}: {first_of(parts)}: parts rather than classes, expected folders (or .zip) train and test"
        )
    labels, count = whole.labels(), torch.tensor([0] * len(whole.classes))
    count += labels.bincount(minlength=len(count))
    wanted = (count * share).round().long()  # of each class
    for side, there in (("test", wanted), ("train", count - wanted)):
        if share < 1 and (lost := [name for name, n in zip(whole.classes, there.tolist(), strict=True) if n == 0]):
            n = count[whole.classes.index(lost[0])]
            raise ValueError(
                f"{whole.path}: --test_share {share:g} of {n} images leaves none to {side} on in class {first_of(lost)}"
            )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # shuffled within each class
    turn = torch.arange(len(labels)) - (count.cumsum(0) - count)[labels[order]]  # 0, 1, ... in each class
    tested = torch.zeros(len(labels), dtype=torch.bool)
    tested[order] = turn < wanted[labels[order]]
    members = {True: {}, False: {}}
    for (name, stamp), is_test in zip(whole.members.items(), tested.tolist(), strict=True):
        members[is_test][name] = stamp
    split = PlainSplit(share, seed, zlib.crc32(b"\n".join(map(as_bytes, members[True]))))
    return tuple(replace(whole, members=members[is_test], whole=whole, split=split) for is_test in (False, True))
