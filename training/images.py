"""Images that live on the device as uint8: CIFAR-10/100 or class folders, batches of them, and their augmentation.

    train, test = load_images("cifar10", "data", device=device)
    train, held_out = split(train, holdout=5000, seed=1997)
    generator = torch.Generator(device).manual_seed(1997)
    for x, labels in train_batches(train, 128, generator): ...

Everything random takes a torch.Generator on the device of the images; nothing in a batch waits for the device.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import atomic_file, progress_bar

CIFAR_STATISTICS = {  # mean and standard deviation of the training pixels per channel, 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "val", "valid", "validation")  # the first that is there is taken
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")  # other files are ignored
RESIZE_RULE = "shortest side to image_size by antialiased bicubic, centre crop"
CACHE_VERSION = 2
DECODE_CHUNK = 256  # images a thread decodes at a time
MAX_THREADS = 8


@dataclass
class ImageSet:
    """Images with their labels, all on one device."""

    images: torch.Tensor  # (N, 3, S, S) uint8
    labels: torch.Tensor  # (N,) long, an index into classes
    classes: list[str]
    mean: tuple[float, float, float]  # of the training images, per channel, 0..1
    std: tuple[float, float, float]

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
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images of a dataset, square with side image_size (pixels).

    dataset: "cifar10", "cifar100" (downloaded into the folder `data` when not there), or "folder": `data` holds
        `train` and `test` (or val, valid, validation), each a folder of class folders or a .zip of class folders.
    cache_dir: where decoded images are kept for the next time (folders only).
        Default: beside the source, or ~/.cache/nag where that cannot be written.
    skip_bad: leave out images that cannot be read, instead of refusing the dataset.
    Raises ValueError or OSError with one line that names what is wrong.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if dataset in CIFAR_STATISTICS:
        train, test = load_cifar(dataset, Path(data), image_size)
    elif dataset == "folder":
        train, test = load_folder(Path(data), image_size, cache_dir, skip_bad)
    else:
        raise ValueError(f"unknown dataset {dataset!r}: expected cifar10, cifar100 or folder")
    return train.to(device), test.to(device)


def load_cifar(dataset: str, data: Path, image_size: int) -> tuple[ImageSet, ImageSet]:
    from torchvision.datasets import CIFAR10, CIFAR100  # imported late: it takes a second

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    try:
        parts = [source(str(data), train=train, download=True) for train in (True, False)]
    except Exception as error:  # no network, a proxy's answer, half a file, a full disk: each raises its own kind
        raise ValueError(
            f"{data} holds no complete {source.base_folder}, and downloading {source.url} into it failed "
            f"({short_reason(error)}); put the extracted files there, or use --dataset folder with images of your own"
        ) from None
    mean, std = CIFAR_STATISTICS[dataset]
    sets = []
    for part in parts:
        pixels = part.data  # (N, 32, 32, 3)
        if image_size != pixels.shape[1]:
            pixels = np.stack([_square(Image.fromarray(image), image_size) for image in pixels])
        sets.append(ImageSet(_channels_first(pixels), torch.tensor(part.targets), list(part.classes), mean, std))
    return sets[0], sets[1]


def load_folder(data: Path, image_size: int, cache_dir: str | Path | None, skip_bad: bool) -> tuple[ImageSet, ImageSet]:
    train, test = list_parts(data)
    if cache_dir is not None:  # refused now rather than after the decoding
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    train_images, train_labels = load_part(train, image_size, cache_dir, skip_bad)
    test_images, test_labels = load_part(test, image_size, cache_dir, skip_bad)
    mean, std = channel_statistics(train_images)
    return (
        ImageSet(train_images, train_labels, train.classes, mean, std),
        ImageSet(test_images, test_labels, test.classes, mean, std),
    )


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, on the 0..1 scale, of uint8 images (N, 3, S, S).

    Exact and light on memory: computed from the histogram of the 256 values.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean.append(float((share * levels).sum()))
        std.append(float((share * (levels - mean[-1]) ** 2).sum().sqrt()))
    return tuple(mean), tuple(max(value, 1 / 255) for value in std)  # a constant channel must not divide by zero


# ------------------------------------------------------------------------------------- folders and zips of images


@dataclass
class Part:
    """The files of one part of a dataset, and what they are known by."""

    path: Path  # a folder or a .zip
    classes: list[str]  # sorted
    members: dict[str, tuple[int, int]]  # sorted "class/.../x.jpg" -> (bytes, mtime in ns, or the CRC in a zip)
    prefix: str = ""  # the single top folder inside a zip, "train/"

    def labels(self) -> torch.Tensor:
        """(N,) long"""
        index = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([index[name.split("/")[0]] for name in self.members])


def list_parts(data: Path) -> tuple[Part, Part]:
    """The training and the test part of a folder that holds both. Raises ValueError when their classes differ."""
    if not data.is_dir():
        raise ValueError(f"{data} is not a folder: expected one that holds train and test, folders or .zip files")
    train, test = (list_part(_find_part(data, names)) for names in (TRAIN_NAMES, TEST_NAMES))
    if train.classes != test.classes:
        only = [(a.path, sorted(set(a.classes) - set(b.classes))) for a, b in ((train, test), (test, train))]
        differing = "; ".join(f"only in {path}: {_some(names)}" for path, names in only if names)
        raise ValueError(f"{data}: train and test must have the same classes, but {differing}")
    return train, test


def _find_part(data: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (data / name).is_dir():
            return data / name
        if (data / f"{name}.zip").is_file():
            return data / f"{name}.zip"
    raise ValueError(f"{data} holds no {' or '.join(names)}: expected a folder of class folders, or a .zip of them")


def list_part(path: Path) -> Part:
    """The images of a folder or .zip of class folders. Raises ValueError when it is built in another way."""
    files, folders = _walk(path) if path.is_dir() else _list_zip(path)
    files = {name: files[name] for name in sorted(files) if _is_image(name)}
    prefix = "" if path.is_dir() else _common_top(files)
    files = {name.removeprefix(prefix): stamp for name, stamp in files.items()}
    folders = {name.removeprefix(prefix) for name in folders if name.startswith(prefix) and not _hidden(name)}

    stray = next((name for name in files if "/" not in name), None)
    if stray:
        raise ValueError(f"{path}: image {stray} is in no class folder, expected CLASS/{stray}")
    filled = {name.split("/")[0] for name in files}
    empty = sorted({name.split("/")[0] for name in folders if name} - filled)
    if empty:
        raise ValueError(f"{path}: no image ({' '.join(EXTENSIONS)}) in class folder {_some(empty)}")
    if len(filled) < 2:
        found = f"only {_some(sorted(filled))}" if filled else "none"
        raise ValueError(f"{path}: expected two or more class folders with images, found {found}")
    return Part(path, sorted(filled), files, prefix)


def _walk(path: Path) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Images, with size and time, and folders below a folder; names are relative to it, with slashes."""

    def refuse(error: OSError):  # os.walk passes over what it cannot list
        raise error

    files, folders = {}, set()
    for folder, _, names in os.walk(path, onerror=refuse, followlinks=True):
        relative = Path(folder).relative_to(path).as_posix()
        base = "" if relative == "." else f"{relative}/"
        folders.add(base)
        for name in filter(_is_image, names):
            status = os.stat(os.path.join(folder, name))
            files[base + name] = (status.st_size, status.st_mtime_ns)
    return files, folders


def _list_zip(path: Path) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Files, with size and checksum, and folders that a zip lists. Nothing of it is ever written to a path."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is not a readable zip ({short_reason(error)})") from None
    for info in infos:
        if info.filename.startswith("/") or ".." in info.filename.split("/"):
            raise ValueError(f"{path}: member {info.filename} leaves the archive, expected CLASS/IMAGE")
        if info.flag_bits & 1:
            raise ValueError(f"{path}: member {info.filename} is encrypted")
    files = {info.filename: (info.file_size, info.CRC) for info in infos if not info.is_dir()}
    return files, {info.filename for info in infos if info.is_dir()}


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not _hidden(name)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX/")) or "/." in name


def _common_top(names: dict[str, tuple[int, int]]) -> str:
    """ "train/" for train/airplane/x.jpg, train/bird/y.jpg, ...; "" when there is no such folder."""
    tops = {name.split("/")[0] for name in names}
    deep = all(name.count("/") >= 2 for name in names)
    return f"{tops.pop()}/" if len(tops) == 1 and deep else ""


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short_reason(error: Exception) -> str:
    """An exception in one short line."""
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        return "not an image"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---------------------------------------------------------------------------------------- decoding and the cache


def load_part(
    part: Part, image_size: int, cache_dir: str | Path | None, skip_bad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, S, S) uint8 and labels (N,) of a part, from the cache when that is still true."""
    key = cache_key(part, image_size)
    files = _cache_files(part, image_size, cache_dir)
    images, broken = next(filter(None, (_read_cache(file, key) for file in files)), (None, {}))
    if images is None:
        pixels, broken = decode(part, image_size, skip_bad)
        images = _channels_first(pixels)
        _write_cache(files, key, images, broken)
    if broken and not skip_bad:
        refuse_broken(part, broken)
    labels = part.labels()
    if broken:
        print(f"{part.path}: {len(broken)} of {len(labels)} images cannot be read, left out: {_some(list(broken))}")
        labels = labels[torch.tensor([name not in broken for name in part.members])]
        lost = [name for i, name in enumerate(part.classes) if not (labels == i).any()]
        if lost:
            raise ValueError(f"{part.path}: no readable image is left in class folder {_some(lost)}")
    return images, labels


def refuse_broken(part: Part, broken: dict[str, str]):
    name, reason = next(iter(broken.items()))
    raise ValueError(
        f"{part.path}: cannot read image {part.prefix}{name} ({reason}); --skip_bad leaves such images out"
    )


def decode(part: Part, image_size: int, skip_bad: bool) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels (N, S, S, 3) uint8 of the images that can be read, and name -> reason of those that cannot.

    PIL decodes and resizes outside of Python's lock: 2 threads on 2 cores took 0.6 of the time of one for JPEGs of
    500 x 375, and the same time (0.13 ms an image) at 32 x 32, where 4 already got into each other's way. One thread
    reads at a time: with each reading its own members, 2 took 1.6 times as long as one at 32 x 32.
    """
    names = list(part.members)
    pixels = np.empty((len(names), image_size, image_size, 3), np.uint8)
    reading = threading.Lock()

    def decode_chunk(start: int) -> dict[str, str]:
        chunk = names[start : start + DECODE_CHUNK]
        with reading:
            contents = [_attempt(read, name) for name in chunk]
        broken = {}
        for i, (name, content) in enumerate(zip(chunk, contents, strict=True), start):
            image = content if isinstance(content, Exception) else _attempt(_decode_image, content, image_size)
            if isinstance(image, Exception):
                broken[name] = short_reason(image)
            else:
                pixels[i] = image
        return broken

    broken = {}
    starts = range(0, len(names), DECODE_CHUNK)
    with reader(part) as read, ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        for found in progress_bar(pool.map(decode_chunk, starts), total=len(starts), desc=f"decode {part.path.name}"):
            broken.update(found)
            if broken and not skip_bad:
                pool.shutdown(wait=False, cancel_futures=True)
                refuse_broken(part, broken)
    if broken:
        pixels = pixels[[name not in broken for name in names]]
    return pixels, broken


def _attempt(step: Callable, *args):
    """The result of a step, or the exception: PIL and zipfile raise all sorts about damaged bytes."""
    try:
        return step(*args)
    except Exception as error:
        return error


@contextlib.contextmanager
def reader(part: Part):
    """A function from the name of a member to its bytes."""
    if part.path.is_dir():
        yield lambda name: (part.path / name).read_bytes()
    else:
        with zipfile.ZipFile(part.path) as archive:
            yield lambda name: archive.read(part.prefix + name)


def _decode_image(data: bytes, image_size: int) -> np.ndarray:
    """The RGB pixels (S, S, 3) of an image file."""
    with Image.open(io.BytesIO(data)) as image:
        return _square(to_rgb(image), image_size)


def to_rgb(image: Image.Image) -> Image.Image:
    """Raises ValueError for pixels of more than 8 bits, which PIL would clip to white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"expected pixels of 8 bits, got mode {image.mode}")
    return image.convert("RGB")


def _square(image: Image.Image, image_size: int) -> np.ndarray:
    """Pixels (S, S, 3), by RESIZE_RULE in one resampling; an image of that size is left as it is."""
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def cache_key(part: Part, image_size: int) -> str:
    """Changes when the decoded images may: with any file's name, size and time (folder) or checksum (zip)."""
    content = [CACHE_VERSION, RESIZE_RULE, image_size, list(part.members.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _cache_files(part: Part, image_size: int, cache_dir: str | Path | None) -> list[Path]:
    """Where the decoded images may be, best first. Named for the source: a rebuilt cache replaces the stale one."""
    source = hashlib.sha256(str(part.path.resolve()).encode()).hexdigest()[:8]
    name = f"{part.path.stem}-{image_size}px-{source}.pt"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [part.path.parent / name, Path(user_cache) / "nag" / name]


def _read_cache(file: Path, key: str) -> tuple[torch.Tensor, dict[str, str]] | None:
    """Images and broken members of a cache; None when it is missing, stale or damaged, for it is then rebuilt."""
    try:
        cache = torch.load(file, weights_only=True)
        if cache["key"] != key or cache["checksum"] != zlib.crc32(cache["images"].numpy()):
            return None
        return cache["images"], cache["broken"]
    except Exception:  # torch.load raises all sorts about damaged files
        return None


def _write_cache(files: list[Path], key: str, images: torch.Tensor, broken: dict[str, str]) -> None:
    """Write to the first place that can be written. A folder marked read-only is left alone, even by root."""
    cache = {"key": key, "checksum": zlib.crc32(images.numpy()), "images": images, "broken": broken}
    for file in files:
        try:
            if file.parent.exists() and not file.parent.stat().st_mode & 0o222:
                raise PermissionError("the folder is read-only")
            with atomic_file(file, "wb") as stream:
                torch.save(cache, stream)
            return
        except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
            reason = short_reason(error)
    print(f"decoded images are not kept for the next run: cannot write {files[-1]} ({reason})")


# ----------------------------------------------------------------------------------------------- choosing images


def check_classes(images: ImageSet, classes: list[str], path: str | Path) -> None:
    """Raise ValueError when the images are not of the classes that the checkpoint at `path` was trained on."""
    if len(images.classes) != len(classes):
        raise ValueError(f"the images have {len(images.classes)} classes, {path} was trained on {len(classes)}")
    for i, (ours, theirs) in enumerate(zip(images.classes, classes, strict=True)):
        if ours != theirs:
            raise ValueError(f"class {i} of the images is {ours}, of {path} {theirs}")


def split(images: ImageSet, holdout: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Take `holdout` images out, as many of each class as possible: (the rest, the held-out part), fixed by seed."""
    if not 0 <= holdout < len(images):
        raise ValueError(f"cannot hold out {holdout} of {len(images)} images")
    order = _balanced_order(images, seed)
    held_out, rest = order[:holdout].sort().values, order[holdout:].sort().values
    labels = images.labels.cpu()
    lost = [name for i, name in enumerate(images.classes) if (labels == i).any() and not (labels[rest] == i).any()]
    if lost:
        raise ValueError(f"holding out {holdout} of {len(images)} leaves none of class {_some(lost)} to train on")
    return images.subset(rest), images.subset(held_out)


def num_balanced(images: ImageSet) -> int:
    """How many images can be taken, the same number of each class."""
    return len(images.classes) * int(images.labels.bincount(minlength=len(images.classes)).min())


def balanced_batch(images: ImageSet, n: int, seed: int, offset: int = 0) -> ImageSet:
    """n images, the same number of each class (or one more), fixed by seed: to score networks on the same images.

    offset: 0, 1, 2, ... name disjoint batches.
    """
    most = num_balanced(images)
    if n < 1 or offset < 0 or (offset + 1) * n > most:
        times = f" {offset + 1} times" if offset else ""
        raise ValueError(f"cannot take {n} class-balanced images{times}: there are {most}")
    return images.subset(_balanced_order(images, seed)[offset * n : (offset + 1) * n])


def _balanced_order(images: ImageSet, seed: int) -> torch.Tensor:
    """A shuffle (N,) that takes one image of every class, again one of every class, ... until classes run out.

    Computed on the CPU, so that it is the same for every device.
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
    """One epoch, shuffled and augmented: (x (B, 3, S, S) float channels_last, labels (B,)) a batch.

    The images left over after the last whole batch are dropped.
    """
    if not 0 < batch_size <= len(images):
        raise ValueError(f"cannot draw batches of {batch_size} from {len(images)} images")
    order = torch.randperm(len(images), generator=generator, device=images.labels.device)
    for index in order[: len(images) // batch_size * batch_size].split(batch_size):
        x = augment(images.images[index], images.mean, images.std, generator, padding, cutout_size)
        yield x, images.labels[index]


def eval_batches(images: ImageSet, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images in order, normalised only: (x (B, 3, S, S) float channels_last, labels (B,))."""
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        yield normalize(images.images[batch], images.mean, images.std), images.labels[batch]


def augment(
    images: torch.Tensor, mean: tuple, std: tuple, generator: torch.Generator, padding: int = 4, cutout_size: int = 16
) -> torch.Tensor:
    """Random crop, flip and cutout of uint8 images (B, 3, S, S); returns them normalised, float, channels_last."""
    images = random_flip(random_crop(images, generator, padding), generator)
    return cutout(normalize(images, mean, std), generator, cutout_size)


def random_crop(images: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Shift each image (B, 3, S, S) by up to `padding` pixels each way; black comes in from outside."""
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
    """Zero a square of `size` pixels in each image (B, 3, S, S), which after normalisation is the mean colour.

    The centre is uniform over the pixels and the square is clipped at the border (DeVries & Taylor 2017): at size 16
    on 32 x 32 its mean area is 196 pixels, not 256. Size 0 does nothing.
    """
    if size == 0:
        return images
    n, _, _, side = images.shape
    centre = torch.randint(side, (2, n, 1), generator=generator, device=images.device)
    distance = torch.arange(side, device=images.device) - centre  # (2, B, S): of rows, of columns
    rows, columns = (distance >= -(size // 2)) & (distance < size - size // 2)
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return images * ~hole  # masked_fill would lose channels_last


def normalize(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """uint8 images (B, 3, S, S) to channels_last floats with mean 0 and standard deviation 1 over the training set."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.channels_last).mul_(scale).add_(shift)


@functools.cache  # made once for each device: copying numbers there makes the host wait
def _scale_and_shift(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, ...]:
    """scale, shift (3, 1, 1) such that pixel * scale + shift = (pixel / 255 - mean) / std."""
    mean, std = torch.tensor([mean, std], dtype=torch.float64)[:, :, None, None]
    return (1 / (255 * std)).to(device, torch.float32), (-mean / std).to(device, torch.float32)
