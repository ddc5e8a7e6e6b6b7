"""Classes of single image files by trained networks, for --predict of train_cifar.py and train_imagenet.py:

    files = find_images("DIR")                              # or one file
    rows = predict(files, prepare, members, device, ...)    # one a file, those that cannot be read included
    write_predictions(folder / "predictions.csv", rows, classes)

and what a network chose for the test images, for predictions.npz:

    choices = Choices(mean, std)                            # its `add` is called with each batch
    write_choices(folder / "predictions.npz", choices.arrays(), classes)

Every image is resized and cropped as those that the networks were tested on.
"""

import argparse
import csv
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.network import Network
from plumbing.console import progress_bar
from plumbing.files import atomic_file
from training import distributed
from training.image_decoding import (
    channels_first,
    decode_image,
    read_file,
    short_reason,
    shown_text,
    without_pil_warnings,
)
from training.image_files import EXTENSIONS, MAX_THREADS, is_image
from training.images import normalize
from training.steps import vote
from utils import autocast, fail, user_input, writes

TOP = 5  # classes that are told of an image, most probable first
MOST_WRONG = 24  # test images that are kept in predictions.npz
CHUNK_PIXELS = 2**25  # of the images that are decoded at a time


class Member(NamedTuple):
    """A network of an ensemble (or the only one), in eval mode, and by what its images are normalised."""

    network: Network
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Prediction(NamedTuple):
    """What is said of an image file.

    chosen: index of the class that it is put in. top: (index of a class, probability), most probable first.
    error: why the file cannot be read; "" where it can.
    """

    file: str
    chosen: int = -1
    probability: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    error: str = ""


def find_images(path: str | Path) -> list[Path]:
    """The file `path`, whatever its name, or all images in the folder `path` and below it, sorted.

    Folders and files whose names begin with a dot are passed over, as in training. A folder that links lead to twice is
    entered once. Raises ValueError or OSError when there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"no such file or folder: {path}")

    def refuse(error: OSError):  # os.walk passes over what it cannot list
        raise error

    found, entered = [], set()
    for folder, below, names in os.walk(path, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (identity := (status.st_dev, status.st_ino)) in entered and status.st_ino:
            below.clear()
            continue
        entered.add(identity)
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [Path(folder, name) for name in names if is_image(name)]
    if not found:
        raise ValueError(f"no image ({' '.join(EXTENSIONS)}) in {path}")
    return sorted(found)


# --------------------------------------------------------------------------------------------------- predictions


def pixels_of(content: bytes, image_size: int) -> Tensor:
    """The image of a file's content as training.images.load_images has it, (3, S, S) uint8."""
    return channels_first(decode_image(content, image_size)[None].copy())[0]


@torch.inference_mode()
def predict(
    files: list[Path],
    prepare: Callable[[bytes], Tensor],
    members: list[Member],
    args: argparse.Namespace,
    device: torch.device,
) -> list[Prediction]:
    """What the networks say of each file, in order.

    prepare: makes an image (3, S, S) uint8 of a file's content, or raises. args: --eval_batch_size, --image_size,
    --amp and, for several networks, --voting.
    """
    rows = []
    size = max(1, min(args.eval_batch_size, CHUNK_PIXELS // args.image_size**2))
    starts = range(0, len(files), size)

    def attempt(file: Path) -> Tensor | Exception:
        try:
            return prepare(read_file(file))
        except Exception as error:  # PIL and torchcodec raise all sorts about damaged bytes
            return error

    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS))
    with without_pil_warnings(), threads as pool:
        for start in progress_bar(starts, desc="predict"):
            chunk = files[start : start + size]
            images = list(pool.map(attempt, chunk))
            readable = [image for image in images if isinstance(image, Tensor)]
            told = iter(classify(torch.stack(readable).to(device), members, args) if readable else ())
            for file, image in zip(chunk, images, strict=True):
                broken = not isinstance(image, Tensor)
                rows.append(Prediction(str(file), error=short_reason(image)) if broken else told_of(file, next(told)))
    return rows


def classify(images: Tensor, members: list[Member], args: argparse.Namespace) -> list[tuple[int, Tensor]]:
    """The class that the networks put each image in, and its probabilities (classes,) on the CPU.

    images: (B, 3, S, S) uint8. Several networks vote by --voting: "hard" has the mean of their probabilities, of which
    the most probable class need not be the one with the most votes; "soft" the probabilities of their mean logits.
    """
    logits = []
    for member in members:
        with autocast(args.amp, images.device):
            found, _ = member.network(normalize(images, member.mean, member.std))
        logits.append(found.float())
    logits = torch.stack(logits)  # (networks, B, classes)
    voting = getattr(args, "voting", "hard")
    probabilities = logits.mean(0).softmax(1) if voting == "soft" else logits.softmax(2).mean(0)
    return list(zip(vote(logits, voting).tolist(), probabilities.cpu(), strict=True))


def told_of(file: Path, found: tuple[int, Tensor]) -> Prediction:
    """The prediction of a file, of a class and probabilities as of classify."""
    chosen, probabilities = found
    values, indices = probabilities.topk(min(TOP, len(probabilities)))
    top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return Prediction(str(file), chosen, probabilities[chosen].item(), top)


# ------------------------------------------------------------------------------------- choices for the test images


class Choices:
    """What a network chooses for each image of an evaluation, and the images that it gets most wrong.

    `add` takes the batches of this process; `arrays` brings those of all processes together. mean, std: by which the
    images are normalised.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.told: list[np.ndarray] = []  # of each batch: labels, classes chosen, their probabilities (3, B)
        self.worst: list[tuple[float, int, np.ndarray]] = []  # probability, place, pixels; the surest first
        self.images = 0

    def add(self, x: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Take down a batch: x (B, 3, S, S) normalised, labels (B,), logits (B, classes)."""
        probability, chosen = logits.float().softmax(1).max(1)
        wrong = (chosen != labels).nonzero()[:, 0]
        wrong = wrong[probability[wrong].argsort(descending=True, stable=True)[:MOST_WRONG]]
        pixels = ((x[wrong].float().cpu() * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        for i, sure, image in zip(wrong.tolist(), probability[wrong].tolist(), pixels, strict=True):
            self.worst.append((sure, self.images + i, image))
        self.worst = sorted(self.worst, key=lambda entry: -entry[0])[:MOST_WRONG]
        self.told.append(torch.stack([labels, chosen, probability]).double().cpu().numpy())
        self.images += len(labels)

    def arrays(self) -> dict[str, np.ndarray]:
        """What write_choices takes, of the images of all processes: those of process 0 first. All have to call it."""
        told, worst, first = [], [], 0
        for batches, of_process, images in distributed.gathered((self.told, self.worst, self.images)):
            told += batches
            worst += [(sure, first + place, pixels) for sure, place, pixels in of_process]
            first += images
        labels, chosen, probability = np.concatenate(told, axis=1)
        worst = sorted(worst, key=lambda entry: -entry[0])[:MOST_WRONG]
        return {
            "labels": labels.astype(np.int64),
            "predicted": chosen.astype(np.int64),
            "probability": probability.astype(np.float32),
            "worst": np.array([place for _, place, _ in worst], np.int64),
            "worst_images": np.array([pixels for *_, pixels in worst], np.uint8),
        }


def write_choices(path: Path, arrays: dict[str, np.ndarray], classes: list[str]) -> None:
    """Write what a network chooses for each test image, for report.py: a .npz file of plain arrays.

    labels, predicted (N,): indices into classes, the names; probability (N,): what the network gives its choice.
    worst (W,): places of the wrong ones of which it was surest; worst_images (W, 3, S, S): their pixels, bytes.
    """
    with writes(path), atomic_file(path, "wb") as file:
        np.savez_compressed(file, classes=np.array(classes), **arrays)


# -------------------------------------------------------------------------------------------------------- output


def write_predictions(path: Path, rows: list[Prediction], classes: list[str]) -> None:
    """Write predictions as CSV: file, prediction, probability, class_1, probability_1, class_2, ..., error.

    What is not UTF-8 in the name of a file is written with escapes.
    """
    ranks = range(min(TOP, len(classes)))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    top = [f"{name}_{rank + 1}" for rank in ranks for name in ("class", "probability")]
    writer.writerow(["file", "prediction", "probability", *top, "error"])
    for row in rows:
        told = [""] * (2 + 2 * len(ranks))
        if not row.error:
            told = [classes[row.chosen], f"{row.probability:.6f}"]
            told += [cell for index, value in row.top for cell in (classes[index], f"{value:.6f}")]
        writer.writerow([row.file, *told, row.error])
    with writes(path), atomic_file(path, "wb") as file:
        file.write(table.getvalue().encode("utf-8", "backslashreplace"))


def print_predictions(rows: list[Prediction], classes: list[str], most: int = 10) -> None:
    """Print the first predictions, how many images each class got, and which files could not be read."""
    read = [row for row in rows if not row.error]
    for row in read[:most]:
        others = [f"{shown_text(classes[index])} {value:.2f}" for index, value in row.top[:3] if index != row.chosen]
        also = f" ({', '.join(others[:2])})" if others else ""
        print(f"{shown_text(row.file)}: {shown_text(classes[row.chosen])} {row.probability:.2f}{also}")
    if len(read) > most:
        print(f"... {len(read) - most} more in the file")
        counts = [sum(row.chosen == i for row in read) for i in range(len(classes))]
        ranked = sorted(range(len(classes)), key=lambda i: -counts[i])[:most]
        print("in all: " + ", ".join(f"{counts[i]} {shown_text(classes[i])}" for i in ranked if counts[i]))
    if broken := [row for row in rows if row.error]:
        first = "; ".join(f"{shown_text(row.file)} ({row.error})" for row in broken[:3])
        print(f"warning: {len(broken)} of {len(rows)} files cannot be read, see the column error: {first}")


def predict_and_write(
    args: argparse.Namespace,
    device: torch.device,
    prepare: Callable[[bytes], Tensor],
    members: list[Member],
    classes: list[str],
    path: Path,
) -> None:
    """Classify the files of --predict, write them to `path` and print them. Ends the script if none can be read.

    prepare: see predict. classes: the names of the networks' classes.
    """
    with user_input("--predict"):
        files = find_images(args.predict)
    rows = predict(files, prepare, members, args, device)
    if all(row.error for row in rows):
        fail(f"--predict: none of {len(rows)} files can be read: {shown_text(rows[0].file)} ({rows[0].error})")
    write_predictions(path, rows, classes)
    print_predictions(rows, classes)
    print(f"wrote {path}")
