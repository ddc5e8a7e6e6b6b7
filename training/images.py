"""Images that live on the device as uint8 (CIFAR-10, CIFAR-100, class folders), their batches and augmentation.

    train, test = load_images("cifar10", "data", device=device)
    train, held_out = split(train, holdout=5000, seed=1997)
    generator = torch.Generator(device).manual_seed(1997)
    for x, labels in train_batches(train, 128, generator): ...

Every random number is drawn from a torch.Generator on the device of the images, which the caller gives. The host never
waits for the device while a batch is made.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from training.image_decoding import channels_first, first_of, short_reason, square_pixels
from training.image_files import PlainSplit, load_part, load_split
from training.image_parts import TEST_SEED, list_parts

CIFAR_STATISTICS = {  # mean and standard deviation of the training pixels in each channel, black 0 and white 1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass
class ImageSet:
    """Images with their labels, all on one device.

    mean, std: of the training images' pixels in each channel, black being 0 and white 1.
    plain_split: how training and test images were split, where they are from one plain tree of class folders.
    """

    images: torch.Tensor  # (N, 3, S, S) uint8
    labels: torch.Tensor  # (N,) long, an index into classes
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    plain_split: PlainSplit | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: torch.Tensor) -> "ImageSet":
        """The images at `index` (M,), in that order."""
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])


# ----------------------------------------------------------------------------------------------------- loading


def load_images(
    dataset: str,
    data: str | Path,
    image_size: int = 32,
    cache_dir: str | Path | None = None,
    skip_bad: bool = False,
    device: torch.device | str = "cpu",
    test_split: tuple[float | None, int] = (None, TEST_SEED),
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of a dataset, as squares of image_size x image_size pixels.

    dataset: "cifar10" or "cifar100", which are downloaded into the folder `data` when they are not there, or "folder":
        `data` holds `train` and `test` (or val, valid, validation), each a folder or a .zip of class folders, or is a
        plain tree, such a folder or .zip itself, that is split.
    cache_dir: the folder in which decoded images are kept for the next time, for dataset "folder" only; None: beside
        the source, or ~/.cache/nag where that cannot be written.
    skip_bad: whether images that cannot be read are left out; else they are an error.
    test_split: share of each class to test on and seed, for a plain tree; see image_parts.list_parts.
    Raises ValueError or OSError with one line that names what is wrong.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if dataset in CIFAR_STATISTICS:
        train, test = load_cifar(dataset, Path(data), image_size)
    elif dataset == "folder":
        train, test = load_folder(Path(data), image_size, cache_dir, skip_bad, test_split)
    else:
        raise ValueError(f"unknown dataset {dataset!r}: expected cifar10, cifar100 or folder")
    return train.to(device), test.to(device)


def load_cifar(dataset: str, data: Path, image_size: int) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 or CIFAR-100 in the folder `data`; see load_images."""
    from torchvision.datasets import CIFAR10, CIFAR100  # imported late: it takes a second

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    try:
        parts = [source(str(data), train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, a proxy's answer, half a file, a full disk: each raises its own kind
        raise ValueError(
            f"{data} holds no complete {source.base_folder}, and {source.url} cannot be downloaded "
            f"({short_reason(error)}): extract it there, or use --dataset folder"
        ) from None
    mean, std = CIFAR_STATISTICS[dataset]
    sets = []
    for part in parts:
        pixels = part.data  # (N, 32, 32, 3)
        if image_size != pixels.shape[1]:
            pixels = np.stack([square_pixels(Image.fromarray(image), image_size) for image in pixels])
        sets.append(ImageSet(channels_first(pixels), torch.tensor(part.targets), list(part.classes), mean, std))
    return sets[0], sets[1]


def load_folder(
    data: Path, image_size: int, cache_dir: str | Path | None, skip_bad: bool, test_split: tuple[float | None, int]
) -> tuple[ImageSet, ImageSet]:
    """The images of class folders, normalised by the statistics of their training part; see load_images."""
    train, test = list_parts(data, *test_split)
    if cache_dir is not None:  # refused now rather than after the decoding
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    if train.split:
        loaded = load_split(train, test, image_size, cache_dir, skip_bad)
    else:
        loaded = [load_part(part, image_size, cache_dir, skip_bad) for part in (train, test)]
    mean, std = channel_statistics(loaded[0][0])
    train, test = (ImageSet(*images, train.classes, mean, std, train.split) for images in loaded)
    return train, test


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, 3, S, S), black being 0 and white 1.

    They are computed exactly from the histogram of the 256 values, because the images as floats may not fit in memory.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean.append(float((share * levels).sum()))
        std.append(float((share * (levels - mean[-1]) ** 2).sum().sqrt()))
    return tuple(mean), tuple(max(value, 1 / 255) for value in std)  # a constant channel must not divide by zero


# ----------------------------------------------------------------------------------------------- choosing images


def check_classes(images: ImageSet, classes: list[str], path: str | Path) -> None:
    """Raise ValueError when the images have other classes than `classes`, those of the checkpoint at `path`."""
    if len(images.classes) != len(classes):
        raise ValueError(f"the images have {len(images.classes)} classes, {path} was trained on {len(classes)}")
    for i, (ours, theirs) in enumerate(zip(images.classes, classes, strict=True)):
        if ours != theirs:
            raise ValueError(f"class {i} of the images is {ours}, of {path} {theirs}")


def split(images: ImageSet, holdout: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out `holdout` images: returns the rest and the held-out images, both fixed by the seed.

    Each class gives as many images as any other, as far as it has them. Raises ValueError when a class is left without
    images to train on.
    """
    if not 0 <= holdout < len(images):
        raise ValueError(f"cannot hold out {holdout} of {len(images)} images")
    order = _balanced_order(images, seed)
    held_out, rest = order[:holdout].sort().values, order[holdout:].sort().values
    labels = images.labels.cpu()
    lost = [name for i, name in enumerate(images.classes) if (labels == i).any() and not (labels[rest] == i).any()]
    if lost:
        raise ValueError(f"holding out {holdout} of {len(images)} leaves none of class {first_of(lost)} to train on")
    return images.subset(rest), images.subset(held_out)


def num_balanced(images: ImageSet) -> int:
    """How many images can be taken if every class gives the same number of them."""
    return len(images.classes) * int(images.labels.bincount(minlength=len(images.classes)).min())


def balanced_batch(images: ImageSet, n: int, seed: int, offset: int = 0) -> ImageSet:
    """n images, of which each class gives the same number (or one more), fixed by the seed.

    offset: 0, 1, 2, ... give disjoint batches. Raises ValueError when there are not so many images.
    """
    most = num_balanced(images)
    if n < 1 or offset < 0 or (offset + 1) * n > most:
        times = f" {offset + 1} times" if offset else ""
        raise ValueError(f"cannot take {n} class-balanced images{times}: there are {most}")
    return images.subset(_balanced_order(images, seed)[offset * n : (offset + 1) * n])


def _balanced_order(images: ImageSet, seed: int) -> torch.Tensor:
    """A random order (N,) of the images: one image of every class, then a second one of every class, and so on.

    It is computed on the CPU, so that it is the same for every device.
    """
    generator = torch.Generator().manual_seed(seed)
    labels, num_classes = images.labels.cpu(), len(images.classes)
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # shuffled within each class
    counts = labels.bincount(minlength=num_classes)
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)  # 0, 1, .. in each class
    class_order = torch.randperm(num_classes, generator=generator)[labels[order]]
    return order[(turn * num_classes + class_order).argsort()]


# ------------------------------------------------------------------------------------------ batches, augmentation


def train_batches(
    images: ImageSet, batch_size: int, generator: torch.Generator, cutout_size: int = 16, padding: int = 4
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch, shuffled and augmented: x (B, 3, S, S) float in channels_last layout, labels (B,).

    The images left over after the last whole batch are dropped.
    """
    if not 0 < batch_size <= len(images):
        raise ValueError(f"cannot draw batches of {batch_size} from {len(images)} images")
    order = torch.randperm(len(images), generator=generator, device=images.labels.device)
    for index in order[: len(images) // batch_size * batch_size].split(batch_size):
        x = augment(images.images[index], images.mean, images.std, generator, padding, cutout_size)
        yield x, images.labels[index]


def eval_batches(images: ImageSet, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of all images in order, normalised only: x (B, 3, S, S) float in channels_last layout, labels (B,)."""
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        yield normalize(images.images[batch], images.mean, images.std), images.labels[batch]


def augment(
    images: torch.Tensor, mean: tuple, std: tuple, generator: torch.Generator, padding: int = 4, cutout_size: int = 16
) -> torch.Tensor:
    """Random crop, flip and cutout of uint8 images (B, 3, S, S), normalised to floats in channels_last layout."""
    images = random_flip(random_crop(images, generator, padding), generator)
    return cutout(normalize(images, mean, std), generator, cutout_size)


def random_crop(images: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Shift each image (B, 3, S, S) by up to `padding` pixels up or down and left or right, and fill with black."""
    if padding == 0:
        return images
    n, _, _, size = images.shape
    top, left = torch.randint(2 * padding + 1, (2, n), generator=generator, device=images.device)
    windows = F.pad(images, [padding] * 4).unfold(2, size, 1).unfold(3, size, 1)  # view (B, 3, 2p+1, 2p+1, S, S)
    return windows[torch.arange(n, device=images.device), :, top, left]


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image (B, 3, S, S) left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def cutout(images: torch.Tensor, generator: torch.Generator, size: int = 16) -> torch.Tensor:
    """Set a square of size x size pixels in each normalised image (B, 3, S, S) to 0, the mean colour.

    The centre is uniform over the pixels and the square is clipped at the border (DeVries & Taylor 2017): at size 16
    in 32 x 32 images, its mean area is 196 pixels, not 256. Size 0 does nothing.
    """
    if size == 0:
        return images
    n, _, _, side = images.shape
    centre = torch.randint(side, (2, n, 1), generator=generator, device=images.device)
    distance = torch.arange(side, device=images.device) - centre  # (2, B, S): of rows, of columns
    rows, columns = (distance >= -(size // 2)) & (distance < size - size // 2)
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return images * ~hole  # masked_fill would lose channels_last


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to the device without waiting for it."""
    if device.type != "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalize(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """uint8 images (B, 3, S, S) as floats (pixel / 255 - mean) / std, in channels_last layout."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


@functools.cache  # kept for each device, because copying numbers to it makes the host wait
def _scale_and_shift(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, ...]:
    """scale and shift, (3, 1, 1) each, such that pixel * scale + shift = (pixel / 255 - mean) / std."""
    mean, std = torch.tensor([mean, std], dtype=torch.float64)[:, :, None, None]
    return (1 / (255 * std)).to(device, torch.float32), (-mean / std).to(device, torch.float32)
