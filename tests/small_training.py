"""What tests of training share: images, commands, a number of threads."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Process
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing.locks import hold_folder
from tests import starting
from training.images import ImageSet

ROOT = Path(__file__).parent.parent
NAMES = ["NAG_ENSEMBLE_A", "NAG_ENSEMBLE_B", "NAG_ENSEMBLE_C"]
PHOTO_CLASSES = ("blue", "dark", "green", "light", "red", "white")
TINY = "--dataset folder --layers 1 --channels 4 --batch_size 8 --device cpu --amp off".split()
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
NO_THREADS_LEFT = ("-m", "tests.two_processes")  # for scripts that are files
TWO_PROCESSES = (*TORCHRUN, *NO_THREADS_LEFT)


def as_by_torchrun(patch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    """Set the variables by which torchrun tells a process which of `world` processes on one machine it is."""
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        patch.setenv(name, str(value))


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_images(folder: Path, classes: dict[str, int]) -> Path:
    """24 training and 10 test images a class; a class has noise of its own brightness."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 24), ("test", 10)):
        for name, brightness in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(brightness, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


def make_photos(folder: Path, classes: tuple[str, ...] = PHOTO_CLASSES, test: str = "val") -> Path:
    """8 training and 4 test images a class, about 40 pixels wide; a class has a brightness of its own."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), (test, 4)):
        for k, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(40 * k + 20, 50, (36, 40 + i, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.jpg")
    return folder


def words(line: str, **paths) -> list[str]:
    """The words of a command line with paths in the place of their names: words("--data IMAGES", IMAGES=folder)."""
    return [str(paths.get(word, word)) for word in line.split()]


def start(*command, **options) -> str:
    """Standard output of a script that must succeed, in a process of its own; see tests/starting.py."""
    done = starting.start(*command, **options)
    assert done.status == 0, done.err
    return done.out


def refused(capsys, script, argv: list) -> str:
    """The last line on stderr of a script (a module with parse_args and main) that must end with status 2."""
    with pytest.raises(SystemExit) as error:
        script.main(script.parse_args(list(map(str, argv))))
    stderr = capsys.readouterr().err
    assert error.value.code == 2
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def same_images(a: ImageSet, b: ImageSet) -> bool:
    """Whether two sets hold the same images, labels and classes."""
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.classes == b.classes


def white_images(n: int) -> ImageSet:
    """n images of 32 px, each of a class of its own; normalised, white is 1 and black -1."""
    pixels = torch.full((n, 3, 32, 32), 255, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n), list(map(str, range(n))), (0.5,) * 3, (0.5,) * 3)


def augmented_by(x: torch.Tensor) -> tuple[int, int]:
    """Of many augmented white images: by how many pixels they are shifted at most, and the side of a whole cutout."""
    outside = (x[:, 0] < 0.5).all(2).sum(1).max()  # rows that no white pixel is left in: a cutout is narrower
    return outside.item(), (x[:, 0] == 0).any(2).sum(1).max().item()


@contextmanager
def other_process(folder: Path) -> Iterator[Process]:
    """Another process that holds the lock of a folder, until it is killed or for a minute."""
    processes = multiprocessing.get_context("fork")
    held = processes.Event()
    other = processes.Process(target=lambda: (hold_folder(folder), held.set(), time.sleep(60)))
    other.start()
    try:
        assert held.wait(30)
        yield other
    finally:
        other.kill()
        other.join()
