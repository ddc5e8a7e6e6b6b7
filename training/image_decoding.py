"""One image file: read, and decoded to RGB pixels, within bounds; what is wrong with its bytes is a ValueError.

    data = read_file(Path("x.jpg"))   # or read_member, of a .zip
    image = decode_rgb(data)          # an image of PIL, upright, without transparency
    pixels = decode_image(data, 32)   # (32, 32, 3) uint8

The bounds keep small files that unpack to gigabytes ("bombs") from filling the memory: see docs/formats.md.
"""

import contextlib
import io
import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")  # no other decoder of PIL is asked (EPS starts Ghostscript)
MAX_PIXELS = 89_478_485  # width x height of an image: PIL's own bound, beyond which it only warns
MAX_FILE_BYTES = 2**29  # of one image file, unpacked if it is in a .zip
MAX_RATIO, RATIO_FROM = 100, 2**24  # unpacked / packed bytes of a member of a .zip, for those of more than RATIO_FROM
LONGEST_TEXT = 80  # characters of a name or a reason in a message: files may hold names of 64 KiB

UPRIGHT = {  # the orientation in an image's EXIF data -> how its pixels become what was seen
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_rgb(data: bytes, decode_jpeg: Callable | None = None) -> Image.Image | torch.Tensor:
    """The RGB pixels of an image file: an image of PIL or, where decode_jpeg decoded it, a tensor (3, H, W) uint8.

    It is turned as its EXIF data say and, where it is transparent, put on white. decode_jpeg: a decoder from
    find_jpeg_decoder. Raises ValueError or OSError when the bytes are no image within the bounds.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels, expected at most {MAX_PIXELS} in all")
            if decode_jpeg is not None and data[:2] == b"\xff\xd8" and how_to_turn(image) is None:
                with contextlib.suppress(RuntimeError):  # what it refuses, PIL may still read, or say what is wrong
                    return decode_jpeg(data)
            image.load()
            turn = how_to_turn(image)
            return to_rgb(image if turn is None else image.transpose(turn))
    except OSError:
        raise
    except Exception as error:  # PIL raises all sorts about damaged bytes
        raise ValueError(short_reason(error)) from None


def how_to_turn(image: Image.Image) -> Image.Transpose | None:
    """How the pixels have to be turned to be upright; None: not at all. EXIF data that cannot be read say nothing."""
    if image.format == "TIFF":  # which PIL turns as it decodes
        return None
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # PIL raises all sorts about damaged EXIF data, whose pixels may be sound
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent.

    An image that is transparent everywhere is taken as it is without its transparency: some programs leave that channel
    empty. Raises ValueError for pixels of more than 8 bits, which PIL would clip to white.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"expected pixels of 8 bits, got mode {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.convert("RGBA")
    lowest, highest = transparent.getchannel("A").getextrema()
    if lowest == 255 or highest == 0:
        return image.convert("RGB")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(transparent)
    return page.convert("RGB")


def decode_image(data: bytes, image_size: int) -> np.ndarray:
    """The RGB pixels (S, S, 3) of an image file; see decode_rgb and square_pixels."""
    return square_pixels(decode_rgb(data), image_size)


def square_pixels(image: Image.Image, image_size: int) -> np.ndarray:
    """The pixels (S, S, 3) of an image. One of another size is resized, shortest side to S by antialiased bicubic,
    and the centre is cropped, at once.
    """
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    """Pixels (N, S, S, 3) as a tensor (N, 3, S, S)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def find_jpeg_decoder(name: str) -> Callable | None:
    """A function that decodes JPEG files, bytes -> (3, H, W) uint8; None where PIL is to decode them.

    name: "pil", "torchcodec", or "auto" for torchcodec where it is installed. It gives the same pixels as PIL, and took
    1 / 1.4 of the time (images of 500 x 375 pixels, decoded and cropped).
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


@contextlib.contextmanager
def without_pil_warnings() -> Iterator[None]:
    """Within it, PIL does not warn of large images, which are refused, and of damaged EXIF data. It holds for all
    threads, so that only the main one may enter it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises ValueError when it is larger than allowed, or no regular file."""
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        _check_bytes(status.st_size)
        return file.read(MAX_FILE_BYTES)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a named pipe would wait for a program that writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a member of a .zip. Raises ValueError when it unpacks to more than allowed.

    No more is unpacked than the archive declares: reading without a number of bytes would unpack gigabytes of a member
    that declares ten. Of bzip2 and LZMA, zipfile unpacks whole blocks of any size.
    """
    _check_bytes(info.file_size)
    if info.file_size > RATIO_FROM and info.file_size > MAX_RATIO * info.compress_size:
        raise ValueError(f"{info.compress_size} bytes unpack to {info.file_size}, expected {MAX_RATIO} times at most")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("expected a member that is stored or deflated")
    with archive.open(info) as file:
        return file.read(info.file_size)


def _check_bytes(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes, expected at most {MAX_FILE_BYTES}")


# ---------------------------------------------------------------------------------------------------- messages


def shown_text(text: str, most: int = LONGEST_TEXT) -> str:
    """A text from a file for a message: on one line, printable in any encoding, and without its middle if it is long.

    >>> shown_text("caf\\udce9.png")
    'caf\\\\udce9.png'
    """
    text = text if len(text) <= most else f"{text[: most // 2 - 2]}...{text[1 - most // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short_reason(error: Exception) -> str:
    """An exception in one short line."""
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        return "not an image"
    return shown_text(str(error).splitlines()[0]) if str(error) else type(error).__name__


def first_of(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are, for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return shown_text(", ".join(map(shown_text, names[:most])), 100) + more
