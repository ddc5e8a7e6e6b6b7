"""Images that stay in their files: class folders like ImageNet's, or .zip files of them, streamed in batches.

    train, test = open_images("DIR")
    train, held_out = images.split(train, 10_000, seed=1997)
    stream = TrainStream(train, 224, batch_size=256, workers=8, seed=1997)
    for x, labels in stream.epoch(0, device): ...

Worker processes decode, crop and resize images to uint8; the device flips a whole batch at a time, jitters its colours
(color_jitter.py) and normalises it. All random numbers about an image come from (seed, epoch, image), so that an image
looks the same for any number of workers and of training processes.
"""

import contextlib
import multiprocessing.queues
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from training.color_jitter import augment
from training.image_decoding import MAX_PIXELS, decode_rgb, short_reason, shown_text, without_pil_warnings
from training.image_files import Part, PlainSplit, as_bytes, reader, refuse_broken
from training.image_parts import TEST_SEED, list_parts
from training.images import normalize, to_device
from utils import derive_seed, fail

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's training pixels by channel, 0 black to 1 white
TEST_MARGIN = 256 / 224  # the shortest side of a test image before the centre crop / the side of the crop
PREFETCH = 2  # batches that a worker makes ahead
ORDER_STREAM, IMAGE_STREAM = 1, 2  # keys of derive_seed, for the order of an epoch and for one image


@dataclass
class ImageFiles:
    """The images of one part by their names; nothing is read yet.

    images.split and images.balanced_batch choose among them as among the images of an ImageSet.
    part: where the files are; its members are left out. names: (N,) bytes in an array, which the workers share, where
    each would have to copy a million strings. labels: (N,) long, an index into classes.
    """

    part: Part
    names: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        return self.part.classes

    @property
    def plain_split(self) -> PlainSplit | None:
        """How training and test images were split, where they are from one plain tree of class folders."""
        return self.part.split

    def subset(self, index: Tensor) -> "ImageFiles":
        """The images at `index` (M,), in that order."""
        return replace(self, names=self.names[index.numpy()], labels=self.labels[index])

    def name(self, index: int) -> str:
        return self.names[index].decode("utf-8", "surrogateescape")


def open_images(
    data: str | Path, test_split: tuple[float | None, int] = (None, TEST_SEED)
) -> tuple[ImageFiles, ImageFiles]:
    """The training and the test (val, valid, validation) images of a folder, each a tree of class folders or a .zip.

    test_split: share of each class to test on and seed, for a plain tree; see image_parts.list_parts.
    Only names are read. Raises ValueError or OSError with one line that names what is wrong.
    """
    files = []
    for part in list_parts(Path(data), *test_split):
        names = np.array([as_bytes(name) for name in part.members], dtype=np.bytes_)
        files.append(ImageFiles(replace(part, members={}, whole=None), names, part.labels()))
    return files[0], files[1]


# ------------------------------------------------------------------------------------------------ in the workers


class Batch(NamedTuple):
    """What a worker makes of a batch: the images that it could read, cropped, and which it could not.

    draws: random numbers for the augmentation on the device, uniform from 0 to 1. broken: name -> reason.
    On its way from a worker without shared memory, a batch has arrays in the place of tensors.
    """

    images: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,) long
    draws: Tensor  # (B, 9)
    broken: dict[str, str]


class Decoded(Dataset):
    """Decodes and crops the images of a batch, in a worker.

    random_crop: whether a random part of an image is resized, as in training; else its centre. files: None where only
    `prepared` is used.
    decode_jpeg: a decoder from image_decoding.find_jpeg_decoder.
    """

    def __init__(
        self, files: ImageFiles | None, image_size: int, random_crop: bool, seed: int, decode_jpeg: Callable | None
    ):
        self.files, self.image_size, self.seed, self.decode_jpeg = files, image_size, seed, decode_jpeg
        self.random_crop = random_crop
        resize = v2.Resize(round(image_size * TEST_MARGIN))
        crop = [v2.RandomResizedCrop(image_size)] if random_crop else [resize, v2.CenterCrop(image_size)]
        self.transform = v2.Compose([*crop, v2.PILToTensor()])
        self._opened = contextlib.ExitStack()
        self._read = None

    def __len__(self) -> int:
        return len(self.files)

    @without_pil_warnings()
    def __getitems__(self, key: tuple[int, np.ndarray]) -> Batch:
        """The batch of the images at the indices (B,) in an epoch. key: (epoch, indices)."""
        epoch, indices = key
        images, kept, draws, broken = [], [], [], {}
        for index in indices.tolist():
            with torch.random.fork_rng(devices=[]):  # the transforms have no generator of their own
                torch.default_generator.manual_seed(derive_seed(self.seed, epoch, IMAGE_STREAM, index + 1))
                draw = torch.rand(9)
                try:
                    image = self.image(index)
                except Exception as error:  # PIL, torchcodec and zipfile raise all sorts about damaged bytes
                    broken[self.files.name(index)] = short_reason(error)
                    continue
            images.append(image)
            kept.append(index)
            draws.append(draw)
        if not kept:
            return Batch(torch.empty(0), torch.empty(0), torch.empty(0), broken)
        return Batch(torch.stack(images), self.files.labels[kept], torch.stack(draws), broken)

    def image(self, index: int) -> Tensor:
        """One image, decoded and cropped: (3, S, S) uint8."""
        return self.prepared(self.read(self.files.name(index)))

    def prepared(self, content: bytes) -> Tensor:
        """The image of a file's content, decoded and cropped: (3, S, S) uint8."""
        image = decode_rgb(content, self.decode_jpeg)
        height, width = transforms.get_size(image)
        if not self.random_crop and self.image_size**2 * max(height, width) > MAX_PIXELS * min(height, width):
            raise ValueError(f"{width} x {height} pixels, expected less unequal sides")  # it would be resized whole
        return self.transform(image)

    def read(self, name: str) -> bytes:
        """The content of a file. Each process opens a zip when it first reads, as they must not share a handle."""
        if self._read is None:
            self._read = self._opened.enter_context(reader(self.files.part))
        return self._read(name)


def through_shared_memory(batch: Batch) -> Batch:
    """The loader's collate_fn (samples are batches already): in a worker, the tensors are moved into shared memory.

    Where that is full, the batch goes through a pipe. Left to the loader, a lack of shared memory would be met in a
    thread that drops the batch, for which the run would then wait for ever.
    """
    if get_worker_info() is None:
        return batch
    try:
        return Batch(*(tensor.share_memory_() for tensor in batch[:3]), batch.broken)
    except (RuntimeError, OSError):
        return through_pipe(batch)


def through_pipe(batch: Batch) -> Batch:
    """The loader's collate_fn without shared memory: arrays, which are copied through a pipe."""
    return Batch(*(tensor.numpy() for tensor in batch[:3]), batch.broken)


def start_worker(number: int) -> None:
    """Make a worker end when a batch cannot be sent (for example, too many open files), so that the run ends too.

    Signals that reach all processes of a terminal or a batch job are for the training process, which ends its workers
    when it has saved. It does so by SIGTERM where one hangs, so that a second one is heeded.
    """

    def ignore_once(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)

    for name in {"SIGINT", "SIGUSR1", "SIGHUP"} & signal.__dict__.keys():  # Windows lacks some
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore_once)

    def end(error: Exception, batch: object):
        traceback.print_exception(error, file=sys.stderr)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


@contextlib.contextmanager
def workers_alive() -> Iterator[None]:
    """Within it, the end of a worker (killed, out of memory) ends the script by one line and exit status 2."""
    try:
        yield
    except RuntimeError as error:  # the loader raises it wherever the process is when a worker ends
        if "DataLoader worker" not in str(error):
            raise
        reason = short_reason(error).replace("DataLoader worker", "a process that decodes images")
        fail(f"--workers: {reason}; if memory is short, try fewer", everywhere=True)


# ----------------------------------------------------------------------------------------------------- streams


@dataclass(eq=False)
class Stream:
    """Batches of images on a device, from workers that stay from the first epoch to the last.

    image_size: the side of the crops in pixels.
    workers: the number of processes that decode; 0: the calling one does.
    rank, world: this process reads part `rank` of the `world` parts of every batch.
    skip_bad: whether images that cannot be read are left out; else the first of them raises a ValueError.
    decode_jpeg: a decoder from image_decoding.find_jpeg_decoder.
    pin_memory: whether batches are put where a GPU copies them from.
    shared_memory: whether batches come from the workers through shared memory; else through pipes, which is slower.
    broken: the images that could not be read so far, name -> reason.
    waited: the seconds for which the caller has waited for batches so far.
    """

    files: ImageFiles
    image_size: int
    batch_size: int
    workers: int = 0
    seed: int = 0
    rank: int = 0
    world: int = 1
    skip_bad: bool = False
    decode_jpeg: Callable | None = None
    pin_memory: bool = False
    shared_memory: bool = True
    broken: dict[str, str] = field(default_factory=dict, init=False)
    waited: float = field(default=0.0, init=False)

    random_crop: ClassVar[bool] = False  # see Decoded

    def __post_init__(self):
        self.keys = []  # what the loader sends to the workers: (epoch, indices of images) for each batch
        self.loader = DataLoader(
            Decoded(self.files, self.image_size, self.random_crop, self.seed, self.decode_jpeg),
            batch_sampler=self.keys,
            collate_fn=through_shared_memory if self.shared_memory else through_pipe,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # the loader draws seeds that nobody uses, else from the global stream
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
        )

    def read(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch in order from number `first`, as the workers make them."""
        self.keys[:] = [(epoch, batch.numpy()) for batch in self.batches(epoch)[first:]]
        batches = iter(self.loader)
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            batch = Batch(*map(torch.as_tensor, batch[:3]), batch.broken)
            if batch.broken and not self.skip_bad:
                refuse_broken(self.files.part, batch.broken)
            for name in batch.broken.keys() - self.broken.keys():
                shown = shown_text(self.files.part.prefix + name)
                tqdm.write(f"skipped {self.files.part.path}: {shown} ({batch.broken[name]})")
            self.broken |= batch.broken
            yield batch


class TrainStream(Stream):
    """The training images, shuffled by (seed, epoch) and augmented.

    batch_size counts the images of all processes together. Those left over after the last whole batch are dropped.
    Raises ValueError when there is no whole batch, or when it cannot be shared out evenly.
    """

    random_crop: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size > len(self.files):
            raise ValueError(f"expected batches of at most the {len(self.files)} images, got {self.batch_size}")
        if self.batch_size % self.world:
            raise ValueError(f"expected batches of a multiple of {self.world} images, got {self.batch_size}")

    def __len__(self) -> int:
        return len(self.files) // self.batch_size

    def batches(self, epoch: int) -> list[Tensor]:
        """The indices of the images in this process's part of each batch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, ORDER_STREAM))
        order = torch.randperm(len(self.files), generator=generator)[: len(self) * self.batch_size]
        return [batch[self.rank :: self.world] for batch in order.split(self.batch_size)]

    def epoch(self, epoch: int, device: torch.device, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of x (B, 3, S, S) float in channels_last layout and labels (B,), normalised, from number `first`.

        In the place of images that are skipped, others of the batch are repeated.
        """
        for batch in self.read(epoch, first):
            if batch.broken:
                if not len(batch.labels):
                    raise ValueError(f"{self.files.part.path}: not one image of a batch can be read")
                index = torch.arange(self.batch_size // self.world) % len(batch.labels)
                batch = Batch(*(rows[index] for rows in batch[:3]), batch.broken)
            x = augment(to_device(batch.images, device), batch.draws)
            yield normalize(x, MEAN, STD), to_device(batch.labels, device)


class EvalStream(Stream):
    """All images once, in order; batch_size counts the images of one process. Some of many processes may have none."""

    def batches(self, epoch: int) -> list[Tensor]:
        """The indices of the images in each of this process's batches, the same in every epoch."""
        index = torch.arange(len(self.files))[self.rank :: self.world]
        return list(index.split(self.batch_size)) if len(index) else []

    def epoch(self, epoch: int, device: torch.device, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised batches of x (B, 3, S, S) float in channels_last layout and labels (B,), without broken images."""
        for batch in self.read(epoch, first):
            if len(batch.labels):
                yield normalize(to_device(batch.images, device), MEAN, STD), to_device(batch.labels, device)
