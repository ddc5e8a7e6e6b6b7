"""Image files: what is read is what is there, caches are never outdated, and bad files are named."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import same_images

from training import image_files
from training.image_decoding import decode_image, decode_rgb
from training.image_stream import Decoded, EvalStream, open_images
from training.images import load_images

CLASSES = ("bird", "cat", "dog")


def make_tree(folder: Path, per_class: int = 4, size: tuple[int, int] = (8, 8), seed: int = 0) -> Path:
    """Class folders of random PNG images; size is (width, height)."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def make_zip(folder: Path, prefix: str = "") -> Path:
    path = folder.parent / f"{folder.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder dataset: 3 classes, 4 training and 2 test images each, 8 x 8."""
    make_tree(tmp_path / "data" / "train")
    make_tree(tmp_path / "data" / "test", per_class=2, seed=1)
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def decodes(monkeypatch) -> list[str]:
    """Names of the parts that were decoded rather than read from a cache."""
    calls, real = [], image_files.decode

    def decode(part, *args):
        calls.append(part.path.name)
        return real(part, *args)

    monkeypatch.setattr(image_files, "decode", decode)
    return calls


# ----------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_read_pixel_by_pixel(data, cache):
    train, test = load_images("folder", data, 8, cache)
    assert train.classes == list(CLASSES) and len(train) == 12 and len(test) == 6
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and train.labels.dtype == torch.long
    files = sorted((data / "train").rglob("*.png"))
    expected = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    assert train.images.dtype == torch.uint8 and np.array_equal(train.images.numpy(), expected)
    assert np.allclose(train.mean, expected.mean((0, 2, 3)) / 255)
    assert np.allclose(train.std, expected.std((0, 2, 3)) / 255)
    assert (test.mean, test.std) == (train.mean, train.std)


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_zip_equals_the_folder_it_was_made_of(data, tmp_path, cache, prefix):
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for part in ("train", "test"):
        make_zip(data / part, prefix).rename(zipped / f"{part}.zip")
    for a, b in zip(load_images("folder", data, 8, cache), load_images("folder", zipped, 8, cache), strict=True):
        assert same_images(a, b) and (a.mean, a.std) == (b.mean, b.std)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_test_part_may_be_a_validation_part(data, cache, name):
    (data / "test").rename(data / name)
    assert len(load_images("folder", data, 8, cache)[1]) == 6


def test_other_files_are_passed_over(data, cache):
    (data / "train" / "cat" / "notes.txt").write_text("not an image")
    (data / "train" / "cat" / ".hidden.png").write_text("not an image")
    (data / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load_images("folder", data, 8, cache)[0]) == 12


def test_other_modes_become_rgb(data, cache):
    file = data / "train" / "bird" / "0.png"
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(file)
    assert (load_images("folder", data, 8, cache)[0].images[0] == 77).all()


@pytest.mark.parametrize("size", [(20, 20), (30, 20), (20, 30), (5, 5)])
def test_images_become_the_wanted_size_once(tmp_path, cache, size):
    make_tree(tmp_path / "train", size=size)
    make_tree(tmp_path / "test", size=size)
    train, test = load_images("folder", tmp_path, 10, cache)
    assert train.images.shape == (12, 3, 10, 10) and test.images.shape == (12, 3, 10, 10)
    image = Image.open(tmp_path / "train" / "bird" / "0.png")  # the slow way: crop the middle, then resize
    side, (width, height) = min(size), size
    left, top = (width - side) / 2, (height - side) / 2
    expected = image.resize((10, 10), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    assert np.array_equal(train.images[0].numpy(), np.asarray(expected).transpose(2, 0, 1))


# ------------------------------------------------------------------------------------------------------- cache


def test_the_second_load_reads_the_cache(data, cache, decodes):
    first = load_images("folder", data, 8, cache)
    second = load_images("folder", data, 8, cache)
    assert decodes == ["train", "test"]
    assert all(same_images(a, b) for a, b in zip(first, second, strict=True)) and first[0].mean == second[0].mean


def test_the_cache_is_rebuilt_when_a_file_changes(data, cache, decodes):
    load_images("folder", data, 8, cache)
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(data / "train" / "cat" / "1.png")
    assert (load_images("folder", data, 8, cache)[0].images[5] == 9).all()
    assert decodes == ["train", "test", "train"]
    (data / "test" / "cat" / "1.png").unlink()
    assert len(load_images("folder", data, 8, cache)[1]) == 5
    assert len(list(cache.iterdir())) == 2  # the stale ones were replaced


def test_the_cache_is_rebuilt_when_a_zip_changes(data, cache, decodes):
    zipped = make_zip(data / "test")
    for file in sorted((data / "test").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (data / "test").rmdir()
    load_images("folder", data, 8, cache)
    new = zipped.parent.parent / "new" / "test"
    make_zip(make_tree(new, per_class=2, seed=5)).replace(zipped)
    changed = load_images("folder", data, 8, cache)[1]
    assert np.array_equal(changed.images[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(new / "bird" / "0.png")))
    assert decodes == ["train", "test.zip", "test.zip"]


def test_each_size_has_its_own_cache(data, cache, decodes):
    for size in (8, 6, 8, 6):
        assert load_images("folder", data, size, cache)[0].images.shape[-1] == size
    assert len(decodes) == 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_cache_is_rebuilt(data, cache, decodes, damage):
    first = load_images("folder", data, 8, cache)
    for file in cache.iterdir():
        content = bytearray(file.read_bytes())
        at = content.index(first[0 if "train" in file.name else 1].images.numpy().tobytes())
        content[at] ^= 255
        file.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "foreign": b"?"}[damage])
    second = load_images("folder", data, 8, cache)
    assert decodes == ["train", "test"] * 2 and all(same_images(a, b) for a, b in zip(first, second, strict=True))


def test_the_cache_lies_beside_the_source(data, decodes):
    for _ in range(2):
        load_images("folder", data, 8)
    assert len(decodes) == 2 and len(list(data.glob("*.pt"))) == 2


def test_a_read_only_source_is_left_alone_and_cached_for_the_user(data, tmp_path, monkeypatch, decodes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.chmod(0o555)  # root could write all the same
    try:
        for _ in range(2):
            load_images("folder", data, 8)
    finally:
        data.chmod(0o755)
    assert sorted(file.name for file in data.iterdir()) == ["test", "train"]
    assert len(decodes) == 2 and len(list((tmp_path / "home" / "nag").iterdir())) == 2


def test_no_place_for_a_cache_is_not_fatal(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(image_files, "cache_files", lambda *_: [tmp_path / "file" / "x.pt"])
    assert len(load_images("folder", data, 8)[0]) == 12
    assert "cannot write" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- bad input


def assert_refused(data: Path, cache: Path, *names: str, **options) -> None:
    """Loading ends in one line that holds all the names."""
    with pytest.raises(ValueError) as caught:
        load_images("folder", data, 8, cache, **options)
    message = str(caught.value)
    assert all(name in message for name in names) and "\n" not in message, message


def test_a_missing_folder_is_refused(tmp_path, cache):
    assert_refused(tmp_path / "nowhere", cache, "nowhere", "not a folder")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_is_refused(data, cache, part):
    (data / part).rename(data / "other")
    assert_refused(data, cache, str(data), f"holds no {part}")


def test_a_part_without_classes_is_refused(data, cache):
    (data / "train").rename(data / "old")
    (data / "train").mkdir()
    assert_refused(data, cache, "train", "expected two or more class folders")


def test_a_part_with_one_class_is_refused(data, cache):
    (data / "deep" / "train").mkdir(parents=True)
    (data / "train").rename(data / "deep" / "train" / "train")
    (data / "test").rename(data / "deep" / "test")
    assert_refused(data / "deep", cache, "train", "expected two or more class folders")


def test_an_image_outside_of_a_class_is_refused(data, cache):
    (data / "train" / "cat" / "0.png").rename(data / "train" / "stray.png")
    assert_refused(data, cache, "train", "stray.png", "CLASS/")


def test_an_empty_class_is_refused(data, cache):
    for part in ("train", "test"):
        (data / part / "empty").mkdir()
    assert_refused(data, cache, "train", "empty", "no image")


def test_differing_classes_are_named(data, cache):
    (data / "train" / "dog").rename(data / "train" / "wolf")
    assert_refused(data, cache, "wolf", "dog", "same classes")


def test_a_link_to_a_parent_or_to_another_class_is_refused_by_both_names(data, cache):
    link = data / "train" / "cat" / "more"
    for target, names in ((".", "cat and cat/more"), ("..", ". and cat/more"), ("../dog", "cat/more and dog")):
        link.symlink_to(target)
        assert_refused(data, cache, "train", f"{names} are the same folder, by a link")
        link.unlink()


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_file_that_is_there_twice_is_refused_by_both_names(data, cache, kind):
    def link(source: Path, target: Path):
        (target.symlink_to if kind == "symbolic" else target.hardlink_to)(source)

    train, test = data / "train", data / "test"
    link(train / "dog" / "0.png", train / "cat" / "x.png")
    assert_refused(data, cache, "train: cat/x.png and dog/0.png are the same file, by a link")
    (train / "cat" / "x.png").unlink()
    link(train / "dog" / "0.png", test / "dog" / "x.png")
    assert_refused(data, cache, f"{data}: train/dog/0.png and test/dog/x.png are the same file, by a link")
    (test / "dog" / "x.png").unlink()
    assert len(load_images("folder", data, 8, cache)[0]) == 12


def test_a_test_part_that_is_a_link_to_the_training_part_is_refused(data, cache):
    for zipped in (False, True):
        (data / "test").rename(data / "other")
        name = "train.zip" if zipped else "train"
        if zipped:
            make_zip(data / "train")
            (data / "train").rename(data / "old")
        (data / name.replace("train", "test")).symlink_to(name)
        assert_refused(data, cache, f"{name}{'' if zipped else '/bird/0.png'} and test", "are the same file")
        (data / "test").unlink(missing_ok=True)
        (data / "other").rename(data / "test")


def test_links_that_repeat_nothing_are_followed(data, tmp_path, cache):
    (data / "train" / "cat").rename(tmp_path / "elsewhere")
    (data / "train" / "cat").symlink_to(tmp_path / "elsewhere")
    (data / "train" / ".all").symlink_to(".")  # hidden, so not entered
    (data / "train" / "dog" / "0.png").rename(tmp_path / "0.png")
    (data / "train" / "dog" / "0.png").symlink_to(tmp_path / "0.png")
    assert load_images("folder", data, 8, cache)[0].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_twice_in_a_zip_is_refused(data, cache):
    path = make_zip(data / "train")
    (data / "train").rename(data / "old")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cat/1.png", b"another")
    assert_refused(data, cache, "train.zip", "cat/1.png is there twice")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_names_that_are_not_utf_8_are_read_by_both_readers(data, cache, capsys, skip_bad):
    for part in ("train", "test"):
        (data / part / "dog").rename(data / part / os.fsdecode(b"caf\xe9"))
    file = data / "train" / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png")
    (data / "train" / os.fsdecode(b"caf\xe9") / "3.png").rename(file)
    train, _ = load_images("folder", data, 8, cache)
    assert same_images(train, load_images("folder", data, 8, cache)[0]) and len(train) == 12
    files, _ = open_images(data)
    batch = next(EvalStream(files, 8, 12).read(0))
    assert files.classes == train.classes == ["bird", os.fsdecode(b"caf\xe9"), "cat"]
    assert torch.equal(batch.images, Decoded(files, 8, False, 0, None).__getitems__((0, np.arange(12))).images)
    file.write_bytes(b"no image")
    stream = EvalStream(open_images(data)[0], 8, 12, skip_bad=skip_bad)
    if skip_bad:
        assert len(load_images("folder", data, 8, cache, skip_bad=True)[0]) == len(next(stream.read(0)).labels) == 11
        assert capsys.readouterr().out.count(r"caf\udce9/\udcff.png") == 2
    else:
        assert_refused(data, cache, r"cannot read image caf\udce9/\udcff.png")
        with pytest.raises(ValueError, match=r"cannot read image caf\\udce9/\\udcff.png"):
            next(stream.read(0))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_dots_before_names_in_a_zip_say_nothing(data, cache):
    expected = load_images("folder", data, 8, cache)[0]
    make_zip(data / "train", "./")
    (data / "train").rename(data / "old")
    assert same_images(load_images("folder", data, 8, cache)[0], expected)
    with zipfile.ZipFile(data / "train.zip", "a") as archive:  # some with dots, some without
        archive.write(data / "old" / "cat" / "0.png", "cat/./x.png")
        archive.write(data / "old" / "cat" / "0.png", "cat/y.png")
        archive.writestr("./cat/.hidden.png", b"not an image")
    train, _ = load_images("folder", data, 8, cache)
    assert len(train) == 14 and torch.equal(train.images[8], train.images[4]) and torch.equal(*train.images[8:10])
    with zipfile.ZipFile(data / "train.zip", "a") as archive:
        archive.writestr("cat/x.png", b"again")
    assert_refused(data, cache, "train.zip", "cat/x.png is there twice")


def test_a_zip_with_names_of_another_encoding_is_refused_by_its_path(data, cache):
    path = make_zip(data / "train", "caf\N{LATIN SMALL LETTER E WITH ACUTE}/")  # so that its names are marked as UTF-8
    path.write_bytes(path.read_bytes().replace(b"caf\xc3\xa9", b"caf\xe9\xe9"))
    (data / "train").rename(data / "old")
    assert_refused(data, cache, f"{path} is not a readable zip")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_opened(data, cache):
    (data / "train" / "cat" / "2.png").unlink()
    os.mkfifo(data / "train" / "cat" / "2.png")
    assert_refused(data, cache, "cannot read image cat/2.png (not a regular file)")
    assert len(load_images("folder", data, 8, cache, skip_bad=True)[0]) == 11
    with pytest.raises(ValueError, match=r"cat/2.png \(not a regular file\)"):
        next(EvalStream(open_images(data)[0], 8, 12).read(0))
    (data / "train" / "cat" / "2.png").unlink()
    (data / "train" / "cat" / "2.png").symlink_to("/dev/zero")
    assert_refused(data, cache, "cannot read image cat/2.png (not a regular file)")


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_broken_image_is_named(data, cache, content, zipped):
    file = data / "train" / "cat" / "2.png"
    file.write_bytes(file.read_bytes()[:100] if content == "truncated" else content)
    if zipped:
        make_zip(data / "train")
        (data / "train").rename(data / "old")
    assert_refused(data, cache, "train", "cat/2.png", "cannot read image")


def test_a_broken_image_is_left_out_when_wanted(data, cache, capsys, decodes):
    expected = load_images("folder", data, 8, cache)[0]
    (data / "train" / "cat" / "2.png").write_bytes(b"not an image")
    for _ in range(2):  # decoded, then from the cache
        train, _ = load_images("folder", data, 8, cache, skip_bad=True)
        rest = torch.arange(12) != 6
        assert torch.equal(train.images, expected.images[rest]) and torch.equal(train.labels, expected.labels[rest])
        out = capsys.readouterr().out
        assert "1 of 12" in out and "cat/2.png" in out and out.count("\n") == 1
    assert decodes == ["train", "test", "train"]
    assert_refused(data, cache, "cat/2.png")  # the cache does not hide it


def test_a_class_of_broken_images_only_is_refused(data, cache):
    for file in (data / "train" / "cat").iterdir():
        file.write_bytes(b"not an image")
    assert_refused(data, cache, "train", "cat", "no readable image", skip_bad=True)


def test_a_broken_member_of_a_zip_is_named(data, cache):
    path = make_zip(data / "train")
    (data / "train").rename(data / "old")
    content = bytearray(path.read_bytes())
    content[200] ^= 255  # in the first member: its checksum fails
    path.write_bytes(content)
    assert_refused(data, cache, "train.zip", "cannot read image")


def test_a_file_that_is_no_zip_is_refused(data, cache):
    (data / "train").rename(data / "old")
    (data / "train.zip").write_bytes(b"not a zip")
    assert_refused(data, cache, "train.zip", "not a readable zip")


@pytest.mark.parametrize("name", ["x.png", "../cat/x.png", "cat/../../x.png", "/tmp/x.png", "cat/x.txt"])
def test_a_zip_of_another_structure_is_refused(data, cache, name):
    (data / "train").rename(data / "old")
    with zipfile.ZipFile(data / "train.zip", "w") as archive:
        archive.writestr(name, b"content")
    before = sorted(data.parent.rglob("*"))
    assert_refused(data, cache, "train.zip")
    assert sorted(data.parent.rglob("*")) == before  # nothing was written, inside or outside


@pytest.mark.parametrize("decode", [decode_rgb, lambda data: decode_image(data, image_size=8)])
def test_pixels_of_16_bits_are_refused_not_clipped(decode):
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="expected pixels of 8 bits, got mode I;16"):
        decode(file.getvalue())


def test_an_unknown_dataset_is_refused(data):
    with pytest.raises(ValueError, match=r"mnist.*expected cifar10, cifar100 or folder"):
        load_images("mnist", data)
    with pytest.raises(ValueError, match="image_size"):
        load_images("folder", data, 0)
