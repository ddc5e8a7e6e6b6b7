"""Images that train_imagenet.py reads, decodes and crops in a second, from a folder and from a .zip.

    python benchmarks/image_stream.py
    python benchmarks/image_stream.py --device cuda

JPEG files of ImageNet's usual size, 500 x 375 pixels and about 100 KB, are made here, of smooth noise. One process with
one thread reads them, as each worker does; the files are in the page cache, so that a disk is not what is measured.
torchcodec, an optional decoder, is measured where it is installed.
"""

if not __package__:
    from as_module import restart

    restart()

import argparse
import importlib.util
import statistics
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.common import Report, begin, interleave, parse_args
from genotypes import GENOTYPES
from models.network import ImageNetNetwork, count_macs
from training.color_jitter import augment
from training.image_decoding import find_jpeg_decoder
from training.image_stream import MEAN, STD, EvalStream, TrainStream, open_images
from training.images import normalize

SIZE, BATCH, CLASSES = 224, 64, 8
SUSTAINED = 10e12  # FLOP/s


def make_images(folder: Path, n: int) -> float:
    """n images in folder/train, and a few in folder/val; returns their mean size in KB."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("val", CLASSES)):
        for i in range(count):
            path = folder / part / f"class{i % CLASSES}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(256, size=(375, 500, 3), dtype=np.uint8))
            noise.filter(ImageFilter.GaussianBlur(1)).save(path, quality=93)
    return statistics.mean(path.stat().st_size for path in (folder / "train").glob("*/*")) / 1e3


def pack(source: Path, target: Path) -> None:
    """source/train and source/val as target/train.zip and target/val.zip, uncompressed."""
    target.mkdir()
    for part in ("train", "val"):
        with zipfile.ZipFile(target / f"{part}.zip", "w") as archive:
            for path in sorted((source / part).rglob("*.jpg")):
                archive.write(path, path.relative_to(source / part))


def input_rates(report: Report, folder: Path) -> float:
    """One figure for each way of reading; returns the highest rate of training images a second."""
    n = BATCH if report.args.quick else 4 * BATCH
    size = make_images(folder / "tree", n)
    pack(folder / "tree", folder / "zips")
    readers = {"PIL": None}
    if importlib.util.find_spec("torchcodec"):
        readers["torchcodec"] = find_jpeg_decoder("torchcodec")
    runs, best = {}, 0.0
    for where in ("tree", "zips"):
        train, _ = open_images(folder / where)
        for name, decoder in readers.items():
            for part, stream in (("training", TrainStream), ("test", EvalStream)):
                batches = stream(train, SIZE, BATCH, decode_jpeg=decoder)
                runs[f"{part} images, {where}, {name}"] = lambda b=batches: [batch.images for batch in b.read(0)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleave(runs, report.args.rounds, torch.device("cpu"))
    torch.set_num_threads(threads)
    for name, values in times.items():
        rates = sorted(n / value for value in values)
        middle = statistics.median(rates)
        best = max(best, middle) if name.startswith("training") else best
        report.figure(
            f"{name}: decoded and cropped to {SIZE} px by one process, files of {size:.0f} KB",
            f"{middle:.0f} images/s ({rates[0]:.0f} to {rates[-1]:.0f})",
        )
    return best


def device_rate(report: Report) -> None:
    """Flip, colour jitter and normalisation of a batch."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8).to(report.device)
    draws = torch.rand(BATCH, 9, generator=generator)
    runs = {"augmentation": lambda: normalize(augment(images, draws), MEAN, STD)}
    values = interleave(runs, report.args.rounds, report.device)["augmentation"]
    report.figure(
        f"flip, colour jitter and normalisation on the device, batch {BATCH}, {SIZE} px",
        f"{BATCH / statistics.median(values):.0f} images/s",
    )


def needed(report: Report, rate: float) -> None:
    """How many processes feed a GPU that trains NAG_HIGH_ACC at a given rate of arithmetic; not a measurement."""
    with torch.device("meta"):
        network = ImageNetNetwork(GENOTYPES["NAG_HIGH_ACC"], num_classes=1000, layers=4, channels=42)
    flops = 3 * 2 * count_macs(network, SIZE)  # forward and, twice as much, backward
    images = SUSTAINED / flops
    report.figure(
        f"a GPU that trains NAG_HIGH_ACC (4 layers, 42 channels) at {SUSTAINED / 1e12:.0f} TFLOP/s, calculated",
        f"{images:.0f} images/s: {images / rate:.0f} such processes",
    )


def main(args: argparse.Namespace) -> None:
    device = begin(args)
    report = Report("image_stream", args, device)
    with tempfile.TemporaryDirectory() as folder:
        rate = input_rates(report, Path(folder))
    device_rate(report)
    needed(report, rate)
    report.finish()


if __name__ == "__main__":
    main(parse_args(__doc__))
