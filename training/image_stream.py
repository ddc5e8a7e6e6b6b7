"""Images that stay in their files: trees of class folders like ImageNet's, or .zip files of them, streamed in batches.

    train, test = open_images("DIR")
    train, held_out = images.split(train, 10_000, seed=1997)
    stream = TrainStream(train, 224, batch_size=256, workers=8, seed=1997)
    for x, labels in stream.epoch(0, device): ...

Worker processes decode, crop and resize to uint8; flip, colour jitter and normalisation are done for a whole batch at a
time on the device. Everything random about an image comes from (seed, epoch, image): neither the number of workers nor
that of training processes changes it.
"""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from training.images import Part, list_parts, normalize, reader, refuse_broken, short_reason, to_rgb
from utils import derive_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training pixels per channel, 0..1
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # a factor from 1 - 0.4 to 1 + 0.4
HUE = 0.2  # up to that part of the colour circle, either way
TEST_MARGIN = 256 / 224  # test images: the shortest side before the centre crop, to the side of the crop
ORDER_STREAM, IMAGE_STREAM = 1, 2  # keys of derive_seed


@dataclass
class ImageFiles:
    """Images of one part, not read yet: what images.split and images.balanced_batch ask of an ImageSet."""

    part: Part  # where they are; without its members
    names: np.ndarray  # (N,) bytes: the workers share an array, where each would copy a million strings
    labels: Tensor  # (N,) long, an index into classes

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[str]:
        return self.part.classes

    def subset(self, index: Tensor) -> "ImageFiles":
        """The images at `index` (M,), in that order."""
        return replace(self, names=self.names[index.numpy()], labels=self.labels[index])

    def name(self, index: int) -> str:
        return self.names[index].decode()


def open_images(data: str | Path) -> tuple[ImageFiles, ImageFiles]:
    """The training and the test (val, valid, validation) images of a folder, each a tree of class folders or a .zip.

    Only names are read. Raises ValueError or OSError with one line that names what is wrong.
    """
    files = []
    for part in list_parts(Path(data)):
        names = np.array([name.encode() for name in part.members])
        files.append(ImageFiles(replace(part, members={}), names, part.labels()))
    return files[0], files[1]


# ------------------------------------------------------------------------------------------------ in the workers


class Batch(NamedTuple):
    """What a worker hands over."""

    images: Tensor  # (B, 3, S, S) uint8, cropped
    labels: Tensor  # (B,) long
    draws: Tensor  # (B, 9) uniform in 0..1, for the augmentation on the device
    broken: dict[str, str]  # name -> reason of the images that cannot be read; they are not among `images`


class Decoded(Dataset):
    """Decodes and crops the images of a batch.

    random_crop: RandomResizedCrop as in training, else resize and centre crop.
    decode_jpeg: see find_jpeg_decoder.
    """

    def __init__(self, files: ImageFiles, image_size: int, random_crop: bool, seed: int, decode_jpeg: Callable | None):
        self.files, self.image_size, self.seed, self.decode_jpeg = files, image_size, seed, decode_jpeg
        resize = v2.Resize(round(image_size * TEST_MARGIN))
        crop = [v2.RandomResizedCrop(image_size)] if random_crop else [resize, v2.CenterCrop(image_size)]
        self.transform = v2.Compose([*crop, v2.PILToTensor()])
        self._opened = contextlib.ExitStack()
        self._read = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, key: tuple[int, np.ndarray]) -> Batch:
        """key: the epoch, and indices of images (B,)"""
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
        """(3, S, S) uint8, cropped"""
        return self.transform(decode(self.read(self.files.name(index)), self.decode_jpeg))

    def read(self, name: str) -> bytes:
        """The file's content. Each process opens a zip once, when it first reads: a handle must not be shared."""
        if self._read is None:
            self._read = self._opened.enter_context(reader(self.files.part))
        return self._read(name)


def decode(data: bytes, decode_jpeg: Callable | None = None) -> Image.Image | Tensor:
    """An image file's RGB pixels, as PIL's image or, from decode_jpeg, (3, H, W) uint8."""
    if decode_jpeg is not None and data[:2] == b"\xff\xd8":
        with contextlib.suppress(RuntimeError):  # what it refuses, PIL may still read, or say what is wrong
            return decode_jpeg(data)
    with Image.open(io.BytesIO(data)) as image:
        return to_rgb(image)


def find_jpeg_decoder(name: str) -> Callable | None:
    """The JPEG decoder for "auto", "pil" (None) or "torchcodec": bytes -> (3, H, W) uint8.

    torchcodec, where installed, gave the same pixels as PIL 1.4 times as fast (500 x 375, decoded and cropped).
    Raises ValueError when torchcodec is asked for and cannot be used.
    """
    if name == "pil":
        return None
    try:
        from torchcodec.decoders import decode_jpeg  # imported late: it is not among the requirements
    except (ImportError, RuntimeError, OSError) as error:  # the last two: a build for another torch
        if name == "auto":
            return None
        raise ValueError(f"torchcodec >= 0.16 cannot be used ({short_reason(error)}): pip install torchcodec") from None
    return decode_jpeg


def as_it_is(batch: Batch) -> Batch:
    """The collate_fn for what is a batch already; a lambda could not be sent to a worker."""
    return batch


# ----------------------------------------------------------------------------------------------------- streams


class Stream:
    """Batches of images on a device. The workers stay from the first epoch on.

    workers: processes that decode; 0: the calling one does.
    rank, world: this process reads part number `rank` of `world` of every batch.
    skip_bad: go on without images that cannot be read, instead of raising a ValueError that names the first.
    broken: the images that could not be read so far, name -> reason.
    waited: seconds for which the caller stood waiting for a batch, in all.
    """

    random_crop = False

    def __init__(
        self,
        files: ImageFiles,
        image_size: int,
        batch_size: int,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        skip_bad: bool = False,
        decode_jpeg: Callable | None = None,
        pin_memory: bool = False,
    ):
        self.files, self.batch_size, self.seed, self.rank, self.world = files, batch_size, seed, rank, world
        self.skip_bad, self.broken, self.waited = skip_bad, {}, 0.0
        self.keys = []  # what the loader sends to the workers, one a batch
        self.loader = DataLoader(
            Decoded(files, image_size, self.random_crop, seed, decode_jpeg),
            batch_sampler=self.keys,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # the loader draws from it what nobody uses, else from the global one
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
        )

    def read(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch as the workers hand them over, in order."""
        self.keys[:] = [(epoch, batch.numpy()) for batch in self.batches(epoch)]
        batches = iter(self.loader)
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - started
            if batch is None:
                return
            if batch.broken and not self.skip_bad:
                refuse_broken(self.files.part, batch.broken)
            for name in batch.broken.keys() - self.broken.keys():
                tqdm.write(f"skipped {self.files.part.path}: {self.files.part.prefix}{name} ({batch.broken[name]})")
            self.broken |= batch.broken
            yield batch


class TrainStream(Stream):
    """Shuffled by (seed, epoch) and augmented; batch_size counts the images of all processes together.

    The images left over after the last whole batch are dropped.
    """

    random_crop = True

    def __len__(self) -> int:
        return len(self.files) // self.batch_size

    def batches(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, ORDER_STREAM))
        order = torch.randperm(len(self.files), generator=generator)[: len(self) * self.batch_size]
        return [batch[self.rank :: self.world] for batch in order.split(self.batch_size)]

    def epoch(self, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(x (B, 3, S, S) float channels_last, labels (B,)); others take the places of images that are skipped."""
        for batch in self.read(epoch):
            if batch.broken:
                if not len(batch.labels):
                    raise ValueError(f"{self.files.part.path}: not one image of a batch can be read")
                index = torch.arange(self.batch_size // self.world) % len(batch.labels)
                batch = Batch(*(rows[index] for rows in batch[:3]), batch.broken)
            x = augment(to_device(batch.images, device), batch.draws)
            yield normalize(x, MEAN, STD), to_device(batch.labels, device)


class EvalStream(Stream):
    """All images once, in order; batch_size counts the images of one process."""

    def batches(self, epoch: int) -> list[Tensor]:
        return list(torch.arange(self.rank, len(self.files), self.world).split(self.batch_size))

    def epoch(self, epoch: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(x (B, 3, S, S) float channels_last, labels (B,)), images that are skipped left out"""
        for batch in self.read(epoch):
            if len(batch.labels):
                yield normalize(to_device(batch.images, device), MEAN, STD), to_device(batch.labels, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without the host waiting for it."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------- augmentation on the device


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Flip with probability 1/2 and jitter the colours of uint8 images (B, 3, S, S); floats from 0 to 255.

    draws: (B, 9) uniform in 0..1, on the CPU: flip, one for each adjustment of the colours, and their order.
    """
    flip, *amounts = to_device(draws[:, :5], images.device).T[..., None, None, None]  # (B, 1, 1, 1) each
    images = torch.where(flip < 0.5, images.flip(3), images).float()
    ranges = ((1, BRIGHTNESS), (1, CONTRAST), (1, SATURATION), (0, HUE))
    amounts = [centre + spread * (2 * amount - 1) for amount, (centre, spread) in zip(amounts, ranges, strict=True)]
    return color_jitter(images, amounts, draws[:, 5:].argsort(1))


def color_jitter(images: Tensor, amounts: list[Tensor], order: Tensor) -> Tensor:
    """torchvision's ColorJitter, each image by amounts and in an order of its own.

    images: (B, 3, S, S) float from 0 to 255, written to. Unlike uint8 images, not rounded down between adjustments.
    amounts: four of (B, 1, 1, 1): factors of brightness, contrast, saturation, and the turn of the hue.
    order: (B, 4) on the CPU, each row a permutation of 0..3: which adjustment comes first, second, ...
    """
    grouped = to_device(order.argsort(0), images.device)  # (B, 4): for each turn, the images by adjustment
    for turn, index in enumerate(grouped.unbind(1)):
        counts = order[:, turn].bincount(minlength=4).tolist()  # of a CPU tensor: the device is not waited for
        for group, amount, adjust in zip(index.split(counts), amounts, ADJUSTMENTS, strict=True):
            if len(group):
                images[group] = adjust(images[group], amount[group])
    return images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 255)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = transforms.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp(0, 255)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(transforms.rgb_to_grayscale(images), images, factor).clamp(0, 255)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue by `turn` of the colour circle. Hue, value and chroma as in HSV; S * V is the chroma."""
    value, chroma = images.amax(1, keepdim=True), images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    r, g, b = images.split(1, dim=1)
    span = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == g, 2 + (b - r) / span, 4 + (r - g) / span)
    hue = torch.where(value == r, (g - b) / span, hue) + 6 * turn  # (B, 1, S, S), in sixths of the circle
    offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # 5, 3, 1: of red, green, blue
    k = (hue + offsets) % 6  # (B, 3, S, S)
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
