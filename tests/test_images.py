"""Images on the device: CIFAR as it is, splits and batches of them, and augmentation against the slow obvious way."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from small_training import same_images

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

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def image_set(n: int = 60, num_classes: int = 10, size: int = 32, seed: int = 0) -> ImageSet:
    """Random images whose first pixel numbers them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    images[:, 0, 0, 0] = torch.arange(n) % 256
    images[:, 1, 0, 0] = torch.arange(n) // 256
    return ImageSet(images, torch.arange(n) % num_classes, [f"class{i}" for i in range(num_classes)], MEAN, STD)


def numbers(images: ImageSet) -> list[int]:
    return (images.images[:, 0, 0, 0].long() + 256 * images.images[:, 1, 0, 0].long()).tolist()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    assert (
        train.images.shape == (20, 3, size, size)
        and same_images(train, test)
        and train.mean == (0.4914, 0.4822, 0.4465)
    )
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
