"""Decoding of image files: upright, on white, the right formats only, and within bounds."""

import bz2
import io
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from training import image_decoding, image_files
from training.image_decoding import decode_image, decode_rgb, read_member, short_reason, shown_text
from training.image_files import chunks_of, list_part
from training.image_stream import EvalStream, TrainStream, open_images
from training.images import load_images

FORMATS = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif", "PPM": "ppm"}


def smooth(size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A smooth image without symmetry; size is (width, height)."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def equal(image: Image.Image, expected: Image.Image) -> bool:
    return image.mode == expected.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(expected))


def flat_png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, written row by row: small however many pixels it has."""
    packer, row = zlib.compressobj(9), b"\0" * (1 + (width + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read_as_pil_reads_it(kind):
    data = saved(smooth(), kind)
    assert equal(decode_rgb(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("kind", ["EPS", "GIF", "ICO", "PCX", "TGA", "PDF"])
def test_no_other_format_is_tried(kind):
    with pytest.raises(OSError) as caught:
        decode_rgb(saved(smooth(), kind))
    assert short_reason(caught.value) == "not an image"


def test_an_image_file_of_several_pictures_gives_the_first():
    data = saved(smooth(), "TIFF", save_all=True, append_images=[Image.new("RGB", (5, 5))])
    assert equal(decode_rgb(data), smooth())


# ------------------------------------------------------------------------------------------------------- upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(smooth(), kind, exif=exif)
    decoded = decode_rgb(data)
    assert equal(decoded, ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert decoded.size == ((12, 8) if orientation < 5 else (8, 12))
    if kind in ("PNG", "TIFF") and orientation == 6:  # an outside value: the camera was turned, so turn clockwise
        assert np.array_equal(np.asarray(decoded), np.rot90(np.asarray(smooth()), -1))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0"])
def test_damaged_exif_data_are_passed_over(exif):
    data, plain = saved(smooth(), "JPEG", exif=exif), saved(smooth(), "JPEG")
    with warnings.catch_warnings(), image_decoding.without_pil_warnings():
        assert equal(decode_rgb(data), decode_rgb(plain))


def test_a_decoder_of_jpeg_does_not_get_what_has_to_be_turned():
    exif, given = Image.Exif(), []
    plain = saved(smooth(), "JPEG")
    decode_rgb(plain, given.append)
    assert given == [plain]
    exif[ExifTags.Base.Orientation] = 3
    assert decode_rgb(saved(smooth(), "JPEG", exif=exif), given.append).size == (12, 8) and len(given) == 1


# -------------------------------------------------------------------------------------------------- transparency


def test_transparent_pixels_are_put_on_white():
    pixels = np.full((1, 3, 4), (200, 100, 0, 0), np.uint8)
    pixels[0, :, 3] = 0, 51, 255
    expected = [[255, 255, 255], [244, 224, 204], [200, 100, 0]]  # 255 + (colour - 255) * alpha / 255
    assert np.asarray(decode_rgb(saved(Image.fromarray(pixels))))[0].tolist() == expected


def test_a_transparent_colour_or_palette_entry_is_white():
    grey = Image.fromarray(np.uint8([[0, 7, 255]]))
    assert np.asarray(decode_rgb(saved(grey, transparency=7)))[0, :, 0].tolist() == [0, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode_rgb(saved(palette, transparency=0)))[0].tolist() == [[255] * 3, [40, 50, 60]]


@pytest.mark.parametrize("alpha", [0, 255])
def test_an_image_of_one_transparency_keeps_its_colours(alpha):
    image = smooth()
    image.putalpha(alpha)
    assert equal(decode_rgb(saved(image)), smooth())


# -------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded():
    for width, height in ((9460, 9460), (20_000, 20_000)):
        data = flat_png(width, height)
        assert len(data) < 100_000
        with image_decoding.without_pil_warnings(), pytest.raises(ValueError, match="pixels") as caught:
            decode_rgb(data)
        assert "\n" not in str(caught.value)


def two_classes(folder: Path, extra: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """train.zip and test.zip of two classes with one image each, and more members in train.zip."""
    members = {"cat/0.png": saved(smooth()), "dog/0.png": saved(smooth((8, 12)))}
    for part, content in (("train", members | extra), ("test", members)):
        with zipfile.ZipFile(folder / f"{part}.zip", "w", compression) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
    return folder


def refusal(data: Path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_images("folder", data, 8, data / "cache", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(data), "")


def test_a_member_that_unpacks_to_too_much_is_refused_or_left_out(tmp_path, monkeypatch, capsys):
    data = two_classes(tmp_path, {"cat/1.bmp": bytes(20 * 2**20)})
    assert "cannot read image cat/1.bmp (" in refusal(data) and "100 times at most); --skip_bad" in refusal(data)
    assert len(load_images("folder", data, 8, data / "cache", skip_bad=True)[0]) == 2
    assert "1 of 3 images cannot be read, left out: cat/1.bmp" in capsys.readouterr().out
    monkeypatch.setattr(image_decoding, "MAX_FILE_BYTES", 2**20)
    two_classes(tmp_path, {"cat/1.bmp": bytes(20 * 2**20 + 1)})  # another, of which nothing is kept
    assert f"cat/1.bmp ({20 * 2**20 + 1} bytes, expected at most {2**20})" in refusal(data)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "dog").mkdir()
    for name in ("cat/0.png", "dog/0.png"):
        (tmp_path / "train" / name).write_bytes(bytes(2**20 + 1))
    assert "cat/0.png (1048577 bytes, expected at most 1048576)" in refusal(data)


def test_no_more_is_unpacked_than_a_member_declares(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/0.png", bytes(2**26))
    content = path.read_bytes().replace(struct.pack("<I", 2**26), struct.pack("<I", 10))
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        tracemalloc.start()
        with pytest.raises(zipfile.BadZipFile):
            read_member(archive, archive.infolist()[0])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


def test_members_of_other_compressions_are_refused(tmp_path):
    assert len(bz2.compress(bytes(2**24))) < 100  # of which zipfile unpacks whole blocks
    assert "expected a member that is stored or deflated" in refusal(two_classes(tmp_path, {}, zipfile.ZIP_BZIP2))


def test_a_zip_of_too_many_members_or_too_long_a_name_is_refused(tmp_path, monkeypatch):
    data = two_classes(tmp_path, {f"cat/{'x' * 60_000}.png": b""})
    message = refusal(data)
    assert "expected names of at most 1000 bytes, got cat/xxx" in message and len(message) < 200
    monkeypatch.setattr(image_files, "MAX_MEMBERS", 2)
    assert refusal(data) == "/train.zip: expected at most 2 members, got 3"


def test_chunks_are_bounded_in_files_and_in_bytes():
    sizes = [2**20] * 100 + [2**28] + [0] * 600
    chunks = chunks_of(sizes)
    assert [i for chunk in chunks for i in range(len(sizes))[chunk]] == list(range(len(sizes)))
    for chunk in chunks:
        assert chunk.stop - chunk.start <= 256
        assert sum(sizes[chunk]) <= 2**26 or chunk.stop - chunk.start == 1
    assert len(chunks) == 2 + 1 + 3


def test_an_image_of_very_unequal_sides_is_refused_where_it_would_be_resized_whole(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "0.png").write_bytes(flat_png(60_000, 1))
    train, test = open_images(tmp_path)
    assert next(TrainStream(train, 64, 2).read(0)).images.shape == (2, 3, 64, 64)  # a part of it is resized
    with pytest.raises(ValueError, match=r"cat/0.png \(60000 x 1 pixels, expected less unequal sides\)"):
        next(EvalStream(test, 64, 2).read(0))
    assert decode_image(flat_png(60_000, 1), 8).shape == (8, 8, 3)


# ------------------------------------------------------------------------------------------------------ messages


def test_texts_from_files_are_short_and_printable_in_messages(tmp_path):
    assert shown_text("a\nb\x1b[31m\udcff\u202e") == "a\\nb\\x1b[31m\\udcff\\u202e"
    assert shown_text("cat/0.png") == "cat/0.png"
    assert len(shown_text("x" * 65_000)) <= 80
    names = {f"{'n' * 200}{i}/0.png": b"" for i in range(9)}
    message = refusal(two_classes(tmp_path, names))
    assert "and 4 more" in message and len(message) < 200
    bad = two_classes(tmp_path, {f"cat/{'x' * 900}\n.png": b"no image"})
    assert len(refusal(bad)) < 200


def test_a_zip_that_lists_nothing_useful_is_a_value_error(tmp_path):
    for content in (b"", b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18):
        (tmp_path / "x.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.zip"):
            list_part(tmp_path / "x.zip")
