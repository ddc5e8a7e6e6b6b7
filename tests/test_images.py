"""Images: what is read is what is there, and augmentation agrees with the slow obvious way."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import image_stream
from training import images as module
from training.images import (
    ImageSet,
    augment,
    balanced_batch,
    channel_statistics,
    cutout,
    eval_batches,
    load_images,
    normalize,
    random_crop,
    random_flip,
    split,
    train_batches,
)

CLASSES = ("bird", "cat", "dog")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


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
    calls, real = [], module.decode

    def decode(part, *args):
        calls.append(part.path.name)
        return real(part, *args)

    monkeypatch.setattr(module, "decode", decode)
    return calls


def image_set(n: int = 60, num_classes: int = 10, size: int = 32, seed: int = 0) -> ImageSet:
    """Random images whose first pixel numbers them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = torch.arange(n) % 256
    images[:, 1, 0, 0] = torch.arange(n) // 256
    return ImageSet(images, torch.arange(n) % num_classes, [f"class{i}" for i in range(num_classes)], MEAN, STD)


def numbers(images: ImageSet) -> list[int]:
    return (images.images[:, 0, 0, 0].long() + 256 * images.images[:, 1, 0, 0].long()).tolist()


def same(a: ImageSet, b: ImageSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.classes == b.classes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
        assert same(a, b) and (a.mean, a.std) == (b.mean, b.std)


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
    assert all(same(a, b) for a, b in zip(first, second, strict=True)) and first[0].mean == second[0].mean


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
    assert decodes == ["train", "test"] * 2 and all(same(a, b) for a, b in zip(first, second, strict=True))


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
    monkeypatch.setattr(module, "_cache_files", lambda *_: [tmp_path / "file" / "x.pt"])
    assert len(load_images("folder", data, 8)[0]) == 12
    assert "cannot write" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- bad input


def assert_refused(data: Path, cache: Path, *names: str, **options) -> None:
    """Loading ends in one line that holds all the names."""
    with pytest.raises(ValueError) as caught:
        load_images("folder", data, 8, cache, **options)
    message = str(caught.value)
    assert all(name in message for name in names) and "\n" not in message, message


def test_an_unknown_dataset_is_refused(data):
    with pytest.raises(ValueError, match=r"mnist.*expected cifar10, cifar100 or folder"):
        load_images("mnist", data)
    with pytest.raises(ValueError, match="image_size"):
        load_images("folder", data, 0)


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


# ------------------------------------------------------------------------------------------------------- CIFAR


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody answers
    with pytest.raises(ValueError, match=r"holds no complete .*127\.0\.0\.1.*--dataset folder") as caught:
        load_images("cifar10", tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [32, 16])
def test_cifar_is_read_from_its_own_files(tmp_path, monkeypatch, size):
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)

    def write(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = write("batch", {"data": pixels.reshape(20, -1), "labels": [i % 10 for i in range(20)]})
    meta = write("meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    train, test = load_images("cifar10", tmp_path, size)
    assert train.images.shape == (20, 3, size, size) and same(train, test) and train.mean == (0.4914, 0.4822, 0.4465)
    if size == 32:
        assert np.array_equal(train.images.numpy(), pixels)


# --------------------------------------------------------------------------------------------- choosing images


@pytest.mark.parametrize("holdout", [0, 7, 20, 50])
def test_a_split_is_disjoint_whole_and_balanced(holdout):
    images = image_set(n=600)
    train, held_out = split(images, holdout, seed=3)
    assert len(held_out) == holdout
    assert sorted(numbers(train) + numbers(held_out)) == numbers(images)
    counts = held_out.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= (holdout % 10 > 0)
    assert torch.equal(held_out.labels, torch.tensor(numbers(held_out), dtype=torch.long) % 10)  # labels move along


def test_a_split_is_fixed_by_its_seed():
    images = image_set()
    assert numbers(split(images, 20, 3)[1]) == numbers(split(images, 20, 3)[1])
    assert numbers(split(images, 20, 3)[1]) != numbers(split(images, 20, 4)[1])


def test_a_split_of_uneven_classes_is_as_equal_as_possible():
    images = image_set(n=100, num_classes=2)
    images.labels = (torch.arange(100) >= 10).long()  # 10 and 90
    assert split(images, 18, 0)[1].labels.bincount().tolist() == [9, 9]
    with pytest.raises(ValueError, match="none of class class0"):
        split(images, 40, 0)


@pytest.mark.parametrize("holdout", [-1, 60, 61])
def test_an_impossible_split_is_refused(holdout):
    with pytest.raises(ValueError, match=f"{holdout} of 60"):
        split(image_set(), holdout, 0)


@pytest.mark.parametrize("n", [7, 10, 15, 20])
def test_balanced_batches_are_balanced_and_disjoint(n):
    images = image_set(n=600)
    batches = [balanced_batch(images, n, seed=1, offset=i) for i in range(600 // n)]
    for batch in batches:
        counts = batch.labels.bincount(minlength=10)
        assert len(batch) == n and counts.max() - counts.min() <= (n % 10 > 0)
    drawn = [number for batch in batches for number in numbers(batch)]
    assert len(set(drawn)) == len(drawn) == 600 // n * n


def test_a_balanced_batch_is_fixed_by_its_seed():
    images = image_set(n=600)
    assert numbers(balanced_batch(images, 50, 1)) == numbers(balanced_batch(images, 50, 1))
    assert numbers(balanced_batch(images, 50, 1)) != numbers(balanced_batch(images, 50, 2))


def test_too_large_a_balanced_batch_is_refused():
    images = image_set(n=600)
    images.labels[:] = images.labels.clamp(min=1)
    images.labels[:5] = 0  # 5 images of class 0
    assert len(balanced_batch(images, 50, 0)) == 50
    for n, offset in ((51, 0), (50, 1), (0, 0), (10, -1)):
        with pytest.raises(ValueError, match="there are 50"):
            balanced_batch(images, n, 0, offset)


# ------------------------------------------------------------------------------------------------ augmentation


def test_crops_are_windows_of_the_padded_image():
    images = image_set(n=40, size=12).images
    crops = random_crop(images, rng(), padding=3)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)))
    found = set()
    for image, crop in zip(padded, crops.numpy(), strict=True):
        at = [(y, x) for y in range(7) for x in range(7) if np.array_equal(image[:, y : y + 12, x : x + 12], crop)]
        assert len(at) == 1
        found.update(at)
    assert len(found) > 20  # of 49 windows


def test_every_shift_is_equally_likely():
    images = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 1
    where = random_crop(images, rng(), padding=2).sum((0, 1))[2:7, 2:7]
    assert where.sum() == 20_000 and ((where - 800).abs() < 5 * 800**0.5).all()


def test_flips_mirror_about_half():
    images = image_set(n=400, size=6).images
    flipped = random_flip(images, rng())
    count = 0
    for before, after in zip(images, flipped, strict=True):
        mirrored = torch.equal(after, before[:, :, torch.arange(5, -1, -1)])
        assert mirrored != torch.equal(after, before)
        count += mirrored
    assert 160 < count < 240  # 4 standard deviations


def test_cutout_zeroes_one_clipped_square():
    images = torch.ones(200, 3, 32, 32)
    for image in cutout(images, rng(), 16):
        rows, columns = (image[0] == 0).any(1).nonzero()[:, 0], (image[0] == 0).any(0).nonzero()[:, 0]
        expected = torch.ones(3, 32, 32)
        expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        assert torch.equal(image, expected)
        for side in (rows, columns):  # shorter than 16 only at a border
            assert len(side) == 16 or (8 <= len(side) < 16 and (side[0] == 0 or side[-1] == 31))
    assert (images == 1).all()


def test_cutout_has_the_published_mean_area():
    areas = [  # of the square around every one of the 1024 centres
        len(range(max(y - 8, 0), min(y + 8, 32))) * len(range(max(x - 8, 0), min(x + 8, 32)))
        for y in range(32)
        for x in range(32)
    ]
    assert np.mean(areas) == 196
    n = 20_000
    sample = (cutout(torch.ones(n, 1, 32, 32), rng(), 16) == 0).sum((1, 2, 3)).numpy()
    assert abs(sample.mean() - 196) < 4 * np.std(areas) / n**0.5
    for area in set(areas):
        share = areas.count(area) / 1024
        assert abs((sample == area).mean() - share) < 5 * (share / n) ** 0.5


@pytest.mark.parametrize("decode", [image_stream.decode, lambda data: module._decode_image(data, image_size=8)])
def test_pixels_of_16_bits_are_refused_not_clipped(decode):
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="expected pixels of 8 bits, got mode I;16"):
        decode(file.getvalue())


def test_normalize_is_the_textbook_formula():
    images = image_set().images
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    x = normalize(images, MEAN, STD)
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert (x.double() - expected).abs().max() < 1e-5


def test_channel_statistics_are_those_of_numpy():
    images = image_set().images
    pixels = images.numpy() / 255
    assert np.allclose(channel_statistics(images), (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    assert channel_statistics(torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)) == ((0.2,) * 3, (1 / 255,) * 3)


def test_augment_with_all_off_but_the_flip_is_normalize():
    images = image_set().images
    images[..., 16:] = images[..., :16].flip(3)  # mirror images do not change
    x = augment(images, MEAN, STD, rng(), padding=0, cutout_size=0)
    assert torch.equal(x, normalize(images, MEAN, STD))


def test_augment_keeps_shape_and_layout():
    x = augment(image_set().images, MEAN, STD, rng())
    assert x.shape == (60, 3, 32, 32) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert ((x == 0).all(1).sum((1, 2)) >= 64).all()  # the smallest clipped square


def test_augment_leaves_its_input_and_the_global_stream_alone():
    images = image_set().images
    before, state = images.clone(), torch.get_rng_state()
    augment(images, MEAN, STD, rng())
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_does_not_wait_for_the_device():
    images, generator = image_set().to("cuda"), torch.Generator("cuda").manual_seed(0)
    list(train_batches(images, 20, generator))  # makes the cached constants
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(train_batches(images, 20, generator))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert len(batches) == 3 and batches[0][0].is_cuda


# ----------------------------------------------------------------------------------------------------- batches


def test_an_epoch_visits_images_once_and_drops_the_rest():
    images = image_set(n=50)
    images.images[:] = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    seen = []
    for x, labels in train_batches(images, 16, rng(), cutout_size=0, padding=0):
        assert x.shape == (16, 3, 32, 32) and labels.shape == (16,)
        pixels = ((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().long()
        assert torch.equal(pixels % 10, labels)
        seen += pixels.tolist()
    assert len(seen) == len(set(seen)) == 48 and seen != sorted(seen)


def test_the_same_seed_gives_the_same_epochs():
    images = image_set()
    one, two, other = rng(1), rng(1), rng(2)
    for _ in range(2):
        a, b, c = (list(train_batches(images, 20, generator)) for generator in (one, two, other))
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True))
        assert not all(torch.equal(x, u) for (x, _), (u, _) in zip(a, c, strict=True))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="batches of 61 from 60"):
        next(train_batches(image_set(), 61, rng()))


def test_evaluation_takes_every_image_in_order():
    images = image_set(n=50)
    batches = list(eval_batches(images, 16))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), normalize(images.images, MEAN, STD))
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert list(eval_batches(images.subset(torch.tensor([], dtype=torch.long)), 16)) == []
