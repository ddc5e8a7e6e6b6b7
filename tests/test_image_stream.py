"""Streamed images: the same for any number of processes, and augmented as torchvision would, image by image."""

import io
import os
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transforms

from training import image_stream
from training.color_jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION, augment, color_jitter
from training.image_decoding import decode_rgb, find_jpeg_decoder
from training.image_stream import EvalStream, TrainStream, open_images
from training.images import balanced_batch, normalize, split

CPU = torch.device("cpu")
SIZE = 16  # pixels of the crops


def make_tree(folder: Path, classes=("bird", "cat", "dog"), per_class: int = 7, seed: int = 0) -> Path:
    """Class folders of smooth random images of several sizes, as JPEG and PNG."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            image = image.resize((30 + i, 24), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{i}.{'png' if i == 0 else 'jpg'}")
    return folder


def make_zip(folder: Path, path: Path, prefix: str = "") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, prefix + file.relative_to(folder).as_posix())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_tree(folder / "train")
    make_tree(folder / "val", per_class=3, seed=1)
    return folder


@pytest.fixture(scope="module")
def zipped(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zipped")
    make_zip(data / "train", folder / "train.zip")
    make_zip(data / "val", folder / "val.zip", "ILSVRC/")
    return folder


def epoch(stream, number: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(stream.epoch(number, CPU))


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q))  # noqa: B905


# --------------------------------------------------------------------------------------------------- what is read


def test_a_zip_gives_the_same_batches_as_the_folder_it_was_made_of(data, zipped):
    for folder, archive in zip(open_images(data), open_images(zipped), strict=True):
        assert folder.classes == archive.classes == ["bird", "cat", "dog"]
        for stream in (TrainStream, EvalStream):
            assert same(epoch(stream(folder, SIZE, 4)), epoch(stream(archive, SIZE, 4)))


def test_test_images_are_resized_and_centre_cropped_as_torchvision_does(data):
    _, files = open_images(data)
    batches = epoch(EvalStream(files, 28, 100))
    for i, x in enumerate(batches[0][0]):
        image = Image.open(data / "val" / files.name(i)).convert("RGB")
        expected = transforms.center_crop(transforms.resize(image, 32), 28)  # 256 to 224
        assert torch.equal(
            x, normalize(transforms.pil_to_tensor(expected)[None], image_stream.MEAN, image_stream.STD)[0]
        )
    assert torch.equal(batches[0][1], files.labels)


def test_training_images_are_random_crops_of_the_right_image(data):
    files, _ = open_images(data)
    stream = TrainStream(files, SIZE, len(files), seed=3)
    batch = next(stream.read(1))
    order = stream.batches(1)[0]
    assert torch.equal(batch.labels, files.labels[order])
    for pixels, draws, index in zip(batch.images, batch.draws, order.tolist(), strict=True):
        torch.manual_seed(image_stream.derive_seed(3, 1, image_stream.IMAGE_STREAM, index + 1))
        assert torch.equal(draws, torch.rand(9))
        image = Image.open(data / "train" / files.name(index)).convert("RGB")
        assert torch.equal(pixels, transforms.pil_to_tensor(v2.RandomResizedCrop(SIZE)(image)))


def test_a_process_opens_a_zip_once_and_only_when_it_reads(zipped, monkeypatch):
    opened, real = [], zipfile.ZipFile
    files, _ = open_images(zipped)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or real(*args))
    stream = TrainStream(files, SIZE, 4)
    assert opened == []
    epoch(stream), epoch(stream, 1)
    assert len(opened) == 1
    opened.clear()
    epoch(TrainStream(files, SIZE, 4, workers=1))
    assert opened == []  # the worker has a handle of its own


# --------------------------------------------------------------------------------------- who reads which image when


def test_workers_do_not_change_the_batches(zipped):
    files, test = open_images(zipped)
    for stream, images in ((TrainStream, files), (EvalStream, test)):
        alone, two = stream(images, SIZE, 4), stream(images, SIZE, 4, workers=2)
        for number in (0, 1, 0):
            assert same(epoch(alone, number), epoch(two, number))


def test_reading_in_the_main_process_leaves_its_random_numbers_alone(data):
    stream = TrainStream(open_images(data)[0], SIZE, 4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch(stream)
    assert torch.equal(torch.rand(3), expected)


def test_two_processes_share_the_batches_of_one(data):
    files, _ = open_images(data)
    whole = epoch(TrainStream(files, SIZE, 6), 2)
    halves = [epoch(TrainStream(files, SIZE, 6, rank=rank, world=2), 2) for rank in range(2)]
    for (x, labels), *parts in zip(whole, *halves, strict=True):
        for rank, (part, part_labels) in enumerate(parts):
            assert torch.equal(x[rank::2], part) and torch.equal(labels[rank::2], part_labels)


def test_an_epoch_takes_images_once_and_drops_the_rest(data):
    files, _ = open_images(data)  # 21 images
    stream = TrainStream(files, SIZE, 4)
    orders = [torch.cat(stream.batches(number)) for number in range(2)]
    assert len(stream) == len(epoch(stream)) == 5
    assert all(len(order.unique()) == 20 for order in orders)
    assert not torch.equal(*orders)
    assert not torch.equal(orders[0], torch.cat(TrainStream(files, SIZE, 4, seed=1).batches(0)))


@pytest.mark.parametrize("world", [1, 2, 4, 21, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_takes_every_image_exactly_once(data, world, batch_size):
    files, _ = open_images(data)
    streams = [EvalStream(files, SIZE, batch_size, rank=rank, world=world) for rank in range(world)]
    seen = torch.cat([batch for stream in streams for batch in stream.batches(0)])
    assert sorted(seen.tolist()) == list(range(21))
    labels = torch.cat([y for stream in streams for _, y in stream.epoch(0, CPU)])
    assert torch.equal(labels.bincount(), files.labels.bincount())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_without_images_evaluates_none(data, workers):
    files, _ = open_images(data)
    for rank in (21, 22, 49):
        stream = EvalStream(files, SIZE, 4, rank=rank, world=50, workers=workers)
        assert epoch(stream) == [] and epoch(stream) == []


def test_training_batches_that_cannot_be_had_or_shared_out_are_refused_beforehand(data):
    files, _ = open_images(data)
    with pytest.raises(ValueError, match="batches of at most the 21 images, got 22"):
        TrainStream(files, SIZE, 22)
    with pytest.raises(ValueError, match="batches of a multiple of 4 images, got 6"):
        TrainStream(files, SIZE, 6, world=4)


def test_a_part_can_be_held_out_and_a_balanced_part_taken(data):
    files, _ = open_images(data)
    rest, held_out = split(files, 6, seed=0)
    assert held_out.labels.bincount().tolist() == [2, 2, 2]
    assert set(rest.names) | set(held_out.names) == set(files.names) and len(rest) == 15
    assert balanced_batch(files, 9, seed=0).labels.bincount().tolist() == [3, 3, 3]


# ------------------------------------------------------------------------------------------------- augmentation


def random_images(n: int = 12) -> torch.Tensor:
    """(n, 3, S, S) float from 0 to 255; the last is grey, where a hue does not exist."""
    images = torch.randint(256, (n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).float()
    images[-1] = images[-1, :1]
    return images


def test_jitter_equals_torchvisions_image_by_image():
    images, generator = random_images(), torch.Generator().manual_seed(1)
    amounts = 0.6 + 0.8 * torch.rand(4, 12, generator=generator)
    amounts[3] = torch.rand(12, generator=generator) - 0.5
    order = torch.rand(12, 4, generator=generator).argsort(1)
    ours = color_jitter(images.clone(), list(amounts[..., None, None, None]), order)
    adjust = (
        transforms.adjust_brightness,
        transforms.adjust_contrast,
        transforms.adjust_saturation,
        transforms.adjust_hue,
    )
    for i, image in enumerate(images / 255):
        for op in order[i].tolist():
            image = adjust[op](image, amounts[op, i].item())
        torch.testing.assert_close(ours[i], 255 * image, atol=0.05, rtol=0)


def test_jitter_draws_what_torchvisions_color_jitter_draws():
    """Amounts at both ends of the ranges."""
    jitter = v2.ColorJitter(BRIGHTNESS, CONTRAST, SATURATION, HUE)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    image = random_images(1).byte()
    for end in (0, 1):
        for op, adjust in enumerate(("brightness", "contrast", "saturation", "hue")):
            draws = torch.full((1, 9), 0.5)
            draws[0, 1 + op] = end
            expected = getattr(transforms, f"adjust_{adjust}")(image[0] / 255, ranges[op][end])
            torch.testing.assert_close(augment(image, draws)[0], 255 * expected, atol=0.05, rtol=0)


def test_half_of_the_images_are_flipped():
    images, draws = random_images().byte(), torch.full((12, 9), 0.5)
    draws[:, 0] = torch.linspace(0, 1, 12)
    out = augment(images, draws)
    torch.testing.assert_close(out[:6], images[:6].flip(3).float(), atol=0.05, rtol=0)
    torch.testing.assert_close(out[6:], images[6:].float(), atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_torchcodec_equals_pil_within_rounding(mode):
    decoders = pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed")
    file, rng = io.BytesIO(), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (300, 200), Image.Resampling.BICUBIC
    )
    image.convert(mode).save(file, "JPEG", quality=90)
    crop, outputs = v2.RandomResizedCrop(64), []
    for decoder in (None, decoders.decode_jpeg):
        torch.manual_seed(0)
        image = crop(decode_rgb(file.getvalue(), decoder))
        outputs.append((image if decoder else transforms.pil_to_tensor(image)).int())
    assert (outputs[0] - outputs[1]).abs().max() <= 1


def test_without_torchcodec_pil_decodes_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert find_jpeg_decoder("auto") is None
    assert find_jpeg_decoder("pil") is None
    with pytest.raises(ValueError, match="pip install torchcodec"):
        find_jpeg_decoder("torchcodec")


@pytest.mark.parametrize("decoder", ["pil", "auto"])
def test_png_and_broken_jpeg_are_pils_matter(decoder, data):
    image = decode_rgb((data / "train" / "cat" / "0.png").read_bytes(), find_jpeg_decoder(decoder))
    assert image.size == (30, 24)
    with pytest.raises(OSError):
        decode_rgb((data / "train" / "cat" / "1.jpg").read_bytes()[:200], find_jpeg_decoder(decoder))


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def damaged(tmp_path) -> Path:
    for part, seed in (("train", 0), ("val", 1)):
        make_tree(tmp_path / part, seed=seed)
        (tmp_path / part / "cat" / "2.jpg").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(damaged, workers):
    for stream, files in zip((TrainStream, EvalStream), open_images(damaged), strict=True):
        with pytest.raises(ValueError, match=r"cannot read image cat/2.jpg \(not an image\); --skip_bad"):
            epoch(stream(files, SIZE, 21, workers=workers))


def test_broken_images_are_left_out_or_replaced_and_counted(damaged):
    files, test = open_images(damaged)
    stream = EvalStream(test, SIZE, 1, skip_bad=True)
    assert torch.cat([labels for _, labels in epoch(stream)]).bincount().tolist() == [7, 6, 7]
    assert stream.broken == {"cat/2.jpg": "not an image"}
    stream = TrainStream(files, SIZE, 21, skip_bad=True)
    [(x, labels)] = epoch(stream)
    assert x.shape == (21, 3, SIZE, SIZE) and len(labels) == 21  # batches keep their size
    assert list(stream.broken) == ["cat/2.jpg"]


def test_a_vanished_image_is_named(data, tmp_path):
    make_tree(tmp_path / "train"), make_tree(tmp_path / "test")
    files, _ = open_images(tmp_path)
    (tmp_path / "train" / "dog" / "3.jpg").unlink()
    with pytest.raises(ValueError, match=r"dog/3.jpg \(.*No such file"):
        epoch(TrainStream(files, SIZE, 21))


def test_a_missing_part_and_differing_classes_are_refused(tmp_path):
    make_tree(tmp_path / "train")
    with pytest.raises(ValueError, match="holds no test or val or valid or validation"):
        open_images(tmp_path)
    make_tree(tmp_path / "valid", classes=("bird", "cat", "cow"))
    with pytest.raises(ValueError, match=r"only in .*train: dog; only in .*valid: cow"):
        open_images(tmp_path)


# ------------------------------------------------------------------------------------- workers and shared memory


def test_batches_are_the_same_through_shared_memory_and_through_pipes(data):
    files, test = open_images(data)
    for stream, images in ((TrainStream, files), (EvalStream, test)):
        expected = epoch(stream(images, SIZE, 4), 1)
        assert same(expected, epoch(stream(images, SIZE, 4, workers=2, shared_memory=False), 1))
    batch = next(TrainStream(files, SIZE, 4, workers=1).read(0))
    assert batch.images.is_shared()
    batch = next(TrainStream(files, SIZE, 4, workers=1, shared_memory=False).read(0))
    assert isinstance(batch.images, torch.Tensor) and not batch.images.is_shared()


@pytest.mark.parametrize(
    "error", [RuntimeError("unable to allocate shared memory(shm)"), OSError(24, "Too many open files")]
)
def test_full_shared_memory_is_passed_by(data, monkeypatch, error):
    def full(tensor):
        raise error

    expected = epoch(TrainStream(open_images(data)[0], SIZE, 4))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    stream = TrainStream(open_images(data)[0], SIZE, 4, workers=1)
    assert same(expected, epoch(stream))
    assert not next(stream.read(1)).images.is_shared()


def test_a_batch_that_is_wholly_broken_comes_through(damaged):
    for workers in (0, 1):
        stream = EvalStream(open_images(damaged)[1], SIZE, 1, workers=workers, skip_bad=True)
        assert len(epoch(stream)) == 20


def ended_with_one_line(capsys, stream) -> str:
    """What is said on stderr when reading the stream ends the script."""
    with pytest.raises(SystemExit) as ended, image_stream.workers_alive():
        while True:
            epoch(stream)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_killed_worker_ends_the_run_with_one_line(data, capsys, shared_memory):
    stream = TrainStream(open_images(data)[0], SIZE, 4, workers=1, shared_memory=shared_memory)
    epoch(stream)
    (worker,) = stream.loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    said = ended_with_one_line(capsys, stream)
    assert "error: --workers: a process that decodes images (pid" in said and said.count("\n") == 1


def test_a_batch_that_cannot_be_sent_ends_the_run_rather_than_hanging_it(data, capfd, monkeypatch):
    class Unsendable(dict):
        def __reduce__(self):
            raise OSError(24, "Too many open files")

    broken = lambda batch: batch._replace(broken=Unsendable())  # noqa: E731
    stream = TrainStream(open_images(data)[0], SIZE, 4, workers=1)
    stream.loader.collate_fn = broken
    said = ended_with_one_line(capfd, stream)
    assert "Too many open files" in said and "error: --workers: a process that decodes images (pid" in said


def test_other_errors_pass(data):
    with pytest.raises(RuntimeError, match="another"), image_stream.workers_alive():
        raise RuntimeError("another")
