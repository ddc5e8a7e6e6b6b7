"""Image files on disk: class folders, or .zip files of them, listed, decoded to one size, and kept decoded.

    part = list_part(Path("DIR/train"))                                    # names only
    images, labels = load_part(part, 32, cache_dir=None, skip_bad=False)   # (N, 3, 32, 32) uint8, (N,) long

Whatever is wrong with a file or a folder is a ValueError or OSError of one line that names it.
"""

import contextlib
import hashlib
import json
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plumbing.console import progress_bar
from plumbing.files import atomic_file
from training.image_decoding import (
    channels_first,
    decode_image,
    first_of,
    read_file,
    read_member,
    short_reason,
    shown_text,
    without_pil_warnings,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")  # other files are ignored
RESIZE_RULE = "shortest side to image_size by antialiased bicubic, centre crop"
CACHE_VERSION = 3  # raised when the pixels of an image change
DECODE_CHUNK, CHUNK_BYTES = 256, 2**26  # what a thread reads at a time: images, and bytes unless one image has more
MAX_MEMBERS = 5_000_000  # of a .zip; its list takes half a kilobyte of memory for each
MAX_NAME = 1000  # bytes of an image's name below its part
MAX_THREADS = 8


# ------------------------------------------------------------------------------------- folders and zips of images


class PlainSplit(NamedTuple):
    """How a plain tree of class folders was split: a share of each class is tested on, which the seed decides.

    checksum: of the names of the test images.
    """

    share: float
    seed: int
    checksum: int


@dataclass
class Part:
    """The image files of one part of a dataset, the training or the test part.

    path: a folder or a .zip. classes: the names of its class folders, sorted.
    members: "class/.../x.jpg" -> its size in bytes and its time of change in ns or, in a .zip, its checksum; sorted by
        name. For example {"cat/1.png": (2071, 1700000000000000000), "dog/1.png": ...}.
    prefix: what all names inside a .zip begin with, for example "train/", and `members` leaves out.
    plain: whether it is a plain tree of class folders, without a test part beside it. whole, split: of a part that was
        split off from one, the tree with all members, and how it was split.
    """

    path: Path
    classes: list[str]
    members: dict[str, tuple[int, int]]
    prefix: str = ""
    plain: bool = False
    whole: "Part | None" = None
    split: PlainSplit | None = None

    def labels(self) -> torch.Tensor:
        """The class of each member, an index into `classes`: (N,) long."""
        index = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([index[name.split("/")[0]] for name in self.members], dtype=torch.long)


def list_part(path: Path, seen: dict[tuple[int, int], str] | None = None) -> Part:
    """List the images of a folder or .zip of class folders. Raises ValueError when it is built in another way.

    seen: filled with (device, inode) of each file that holds images -> its name in the folder; "" for a .zip.
    """
    seen = {} if seen is None else seen
    files, folders = _walk(path, seen) if path.is_dir() else _list_zip(path, seen)
    files = {name: files[name] for name in sorted(files) if is_image(name)}
    prefix = "" if path.is_dir() else _common_top(files)
    files = {name.removeprefix(prefix): stamp for name, stamp in files.items()}
    folders = {name.removeprefix(prefix) for name in folders if name.startswith(prefix) and not _hidden(name)}

    if too_long := next((name for name in files if len(as_bytes(name)) > MAX_NAME), None):
        raise ValueError(f"{path}: expected names of at most {MAX_NAME} bytes, got {shown_text(too_long)}")
    stray = next((name for name in files if "/" not in name), None)
    if stray:
        raise ValueError(f"{path}: image {shown_text(stray)} is in no class folder, expected CLASS/IMAGE")
    filled = {name.split("/")[0] for name in files}
    empty = sorted({name.split("/")[0] for name in folders if name} - filled)
    if empty:
        raise ValueError(f"{path}: no image ({' '.join(EXTENSIONS)}) in class folder {first_of(empty)}")
    if len(filled) < 2:
        found = f"only {first_of(sorted(filled))}" if filled else "none"
        raise ValueError(f"{path}: expected two or more class folders with images, found {found}")
    return Part(path, sorted(filled), files, prefix)


def _walk(path: Path, seen: dict[tuple[int, int], str]) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """All images below a folder, as in Part.members, and all folders; names are relative to it, with slashes.

    Links are followed. Raises ValueError for a folder or a file that is there twice, by a link: a link to another
    class, or from a folder to one that holds it, would give images a second time and under wrong labels.
    seen: see list_part.
    """

    def refuse(error: OSError):  # os.walk passes over what it cannot list
        raise error

    files, folders, seen_folders = {}, set(), {}
    for folder, below, names in os.walk(path, onerror=refuse, followlinks=True):
        relative = Path(folder).relative_to(path).as_posix()
        base = "" if relative == "." else f"{relative}/"
        _note_once(path, relative, os.stat(folder), seen_folders)
        folders.add(base)
        below[:] = [name for name in below if not _hidden(f"{base}{name}/")]
        for name in filter(is_image, names):
            status = os.stat(os.path.join(folder, name))
            _note_once(path, base + name, status, seen)
            files[base + name] = (status.st_size, status.st_mtime_ns)
    return files, folders


def _note_once(path: Path, name: str, status: os.stat_result, seen: dict[tuple[int, int], str]) -> None:
    """Note a file or folder below `path` in `seen`. Raises ValueError when it is there under another name."""
    identity = (status.st_dev, status.st_ino)
    if status.st_ino and seen.setdefault(identity, name) != name:  # some file systems number no files
        first, second = sorted((seen[identity], name))
        what = "folder" if stat.S_ISDIR(status.st_mode) else "file"
        names = f"{shown_text(first)} and {shown_text(second)}"
        raise ValueError(f"{path}: {names} are the same {what}, by a link: expected each image once")


def _list_zip(path: Path, seen: dict[tuple[int, int], str]) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """All files of a zip, as in Part.members, and all folders. Nothing of a zip is ever written to the disk.

    seen: see list_part.
    """
    _note_once(path, "", os.stat(path), seen)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile raises all sorts about damaged bytes
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path} is not a readable zip ({short_reason(error)})") from None
    if len(infos) > MAX_MEMBERS:
        raise ValueError(f"{path}: expected at most {MAX_MEMBERS} members, got {len(infos)}")
    files = {}
    for info in infos:
        name, shown = without_dots(info.filename), shown_text(info.filename)
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path}: member {shown} leaves the archive, expected CLASS/IMAGE")
        if info.flag_bits & 1:
            raise ValueError(f"{path}: member {shown} is encrypted")
        if name in files:
            raise ValueError(f"{path}: member {shown} is there twice, expected each image once")
        if not info.filename.endswith("/"):  # is_dir fails for a member without a name
            files[name] = (info.file_size, info.CRC)
    return files, {without_dots(info.filename) for info in infos if info.filename.endswith("/")}


def without_dots(name: str) -> str:
    """The name of a member of a .zip without parts that say nothing: "cat/0.png" for "./cat/0.png"."""
    return "/".join(part for part in name.split("/") if part != ".") if "./" in name else name


def is_image(name: str) -> bool:
    """Whether a file counts as an image, by its name."""
    return name.lower().endswith(EXTENSIONS) and not _hidden(name)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX/")) or "/." in name


def _common_top(names: dict[str, tuple[int, int]]) -> str:
    """ "train/" for train/airplane/x.jpg, train/bird/y.jpg, ...; "" when there is no such folder."""
    tops = {name.split("/")[0] for name in names}
    deep = all(name.count("/") >= 2 for name in names)
    return f"{tops.pop()}/" if len(tops) == 1 and deep else ""


def as_bytes(name: str) -> bytes:
    """A name in UTF-8; the bytes of a file name that is none are kept as they are."""
    return name.encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------- decoding and the cache


def load_part(
    part: Part, image_size: int, cache_dir: str | Path | None, skip_bad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, S, S) uint8 and labels (N,) of a part, from the cache as long as no file has changed.

    image_size: S, in pixels. cache_dir, skip_bad: see images.load_images.
    """
    return without_broken(part, *decoded(part, image_size, cache_dir, skip_bad))


def load_split(
    train: Part, test: Part, image_size: int, cache_dir: str | Path | None, skip_bad: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels as of load_part, of the two parts of a plain tree, which is decoded and cached as a whole."""
    images, broken = decoded(train.whole, image_size, cache_dir, skip_bad)
    names = [name for name in train.whole.members if name not in broken]
    loaded = []
    for part in (train, test):
        own = images[torch.tensor([name in part.members for name in names], dtype=torch.bool)]
        loaded.append(without_broken(part, own, {name: broken[name] for name in broken if name in part.members}))
    return loaded


def decoded(
    part: Part, image_size: int, cache_dir: str | Path | None, skip_bad: bool
) -> tuple[torch.Tensor, dict[str, str]]:
    """Images (N, 3, S, S) that can be read, and name -> reason of those that cannot; see load_part."""
    key = cache_key(part, image_size)
    files = cache_files(part, image_size, cache_dir)
    images, broken = next(filter(None, (read_cache(file, key) for file in files)), (None, {}))
    if images is None:
        pixels, broken = decode(part, image_size, skip_bad)
        images = channels_first(pixels)
        write_cache(files, key, images, broken)
    if broken and not skip_bad:
        refuse_broken(part, broken)
    return images, broken


def without_broken(part: Part, images: torch.Tensor, broken: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a part that could be read, and their labels; says which could not."""
    labels = part.labels()
    if broken:
        print(f"{part.path}: {len(broken)} of {len(labels)} images cannot be read, left out: {first_of(list(broken))}")
        labels = labels[torch.tensor([name not in broken for name in part.members])]
        lost = [name for i, name in enumerate(part.classes) if not (labels == i).any()]
        if lost:
            raise ValueError(f"{part.path}: no readable image is left in class folder {first_of(lost)}")
    return images, labels


def refuse_broken(part: Part, broken: dict[str, str]):
    """Raise the ValueError about the first of the images that cannot be read (name -> reason)."""
    name, reason = next(iter(broken.items()))
    raise ValueError(
        f"{part.path}: cannot read image {shown_text(part.prefix + name)} ({reason}); --skip_bad leaves such images out"
    )


def decode(part: Part, image_size: int, skip_bad: bool) -> tuple[np.ndarray, dict[str, str]]:
    """Pixels (N, S, S, 3) uint8 of the images that can be read, and name -> reason of those that cannot.

    Several threads decode, because PIL works outside of Python's lock: on 2 cores, 2 threads took 0.6 of the time of
    one for JPEG files of 500 x 375 pixels, and as long as one (0.13 ms an image) at 32 x 32, where 4 threads took
    longer. Only one thread reads files at a time: where each read its own, 2 took 1.6 times as long as one at 32 x 32.
    """
    names = list(part.members)
    pixels = np.empty((len(names), image_size, image_size, 3), np.uint8)
    reading = threading.Lock()

    def decode_chunk(chunk: slice) -> dict[str, str]:
        with reading:
            contents = [_attempt(read, name) for name in names[chunk]]
        broken = {}
        for i, (name, content) in enumerate(zip(names[chunk], contents, strict=True), chunk.start):
            image = content if isinstance(content, Exception) else _attempt(decode_image, content, image_size)
            if isinstance(image, Exception):
                broken[name] = short_reason(image)
            else:
                pixels[i] = image
        return broken

    broken = {}
    chunks = chunks_of([size for size, _ in part.members.values()])
    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS))
    with without_pil_warnings(), reader(part) as read, threads as pool:
        for found in progress_bar(pool.map(decode_chunk, chunks), total=len(chunks), desc=f"decode {part.path.name}"):
            broken.update(found)
            if broken and not skip_bad:
                pool.shutdown(wait=False, cancel_futures=True)
                refuse_broken(part, broken)
    if broken:
        pixels = pixels[[name not in broken for name in names]]
    return pixels, broken


def chunks_of(sizes: list[int]) -> list[slice]:
    """Cut a list of files of these sizes into chunks of DECODE_CHUNK files and CHUNK_BYTES bytes at most each."""
    chunks, start, held = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and (i - start == DECODE_CHUNK or held + size > CHUNK_BYTES):
            chunks.append(slice(start, i))
            start, held = i, 0
        held += size
    return [*chunks, slice(start, len(sizes))]


def _attempt(step: Callable, *args):
    """The result of a step, or the exception: PIL and zipfile raise all sorts about damaged bytes."""
    try:
        return step(*args)
    except Exception as error:
        return error


@contextlib.contextmanager
def reader(part: Part):
    """The context of a function that returns the bytes of a member by its name.

    It raises ValueError or OSError, of a .zip also others, for a member that cannot be read or is larger than allowed.
    """
    if part.path.is_dir():
        yield lambda name: read_file(part.path / name)
    else:
        with zipfile.ZipFile(part.path) as archive:
            dotted = {without_dots(info.filename): info for info in archive.infolist() if "./" in info.filename}
            yield lambda name: read_member(
                archive, dotted.get(part.prefix + name) or archive.getinfo(part.prefix + name)
            )


def cache_key(part: Part, image_size: int) -> str:
    """What decoded images are valid for: it changes with the name, size, time or checksum of any file."""
    content = [CACHE_VERSION, RESIZE_RULE, image_size, list(part.members.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cache_files(part: Part, image_size: int, cache_dir: str | Path | None) -> list[Path]:
    """The files in which decoded images may be kept, best first.

    Their names depend on where the source is, not on what it holds, so that a new cache replaces an outdated one.
    A plain tree, which is `data` itself, keeps its cache within, as `data` does that holds train and test.
    """
    source = hashlib.sha256(str(part.path.resolve()).encode()).hexdigest()[:8]
    name = f"{part.path.stem}-{image_size}px-{source}.pt"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    beside = part.path if part.plain and part.path.is_dir() else part.path.parent
    return [beside / name, Path(user_cache) / "nag" / name]


def read_cache(file: Path, key: str) -> tuple[torch.Tensor, dict[str, str]] | None:
    """The images of a cache and the members that could not be read; None when it is missing, outdated or damaged."""
    try:
        cache = torch.load(file, weights_only=True)
        if cache["key"] != key or cache["checksum"] != zlib.crc32(cache["images"].numpy()):
            return None
        return cache["images"], cache["broken"]
    except Exception:  # torch.load raises all sorts about damaged files
        return None


def write_cache(files: list[Path], key: str, images: torch.Tensor, broken: dict[str, str]) -> None:
    """Write a cache to the first of the files that can be written; a read-only folder is left alone, even by root."""
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
